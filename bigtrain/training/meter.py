"""Time, tokens and memory of the steps since the last logged one."""

from __future__ import annotations

import time
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any, NamedTuple

import torch

from bigtrain.planner.plan import Plan
from bigtrain.step_result import StepResult
from bigtrain.training.runtime import host_bytes_peak
from bigtrain.world import ALONE, World


class Skips:
    """Count the steps that changed nothing because loss or gradient was not finite.

    On a GPU a step is asked about when the next one has been taken: by then it knows, and the host need not wait.
    `total` and `in_a_row` are those of a state that `state_dict` returned.
    """

    def __init__(self, *, late: bool, total: int = 0, in_a_row: int = 0) -> None:
        self.total, self.in_a_row = total, in_a_row
        self._late = late
        self._last: StepResult | None = None

    def add(self, result: StepResult) -> bool:
        """Count a step; return whether the one that is known by now was skipped."""
        settled, self._last = (self._last, result) if self._late else (result, None)
        return self._count(settled)

    def state_dict(self) -> dict[str, int]:
        """Return the counts with the last step in them, which waits for the device."""
        settled, self._last = self._last, None
        self._count(settled)
        return {"total": self.total, "in_a_row": self.in_a_row}

    def _count(self, settled: StepResult | None) -> bool:
        if settled is None:
            return False
        self.total += settled.skipped
        self.in_a_row = self.in_a_row + 1 if settled.skipped else 0
        return settled.skipped


class Due(NamedTuple):
    """A metrics row that is due: what is known of it before the device has taken its step; bytes are peaks so far."""

    result: StepResult
    step: int
    tokens: int
    skipped: int
    steps: int
    """Taken since the last row."""
    allocated: int | None
    reserved: int | None
    host_bytes_peak: int


class Meter:
    """Measure the steps of a run, against a peak in FLOP/s of all devices; evaluations and saves take no time."""

    def __init__(self, plan: Plan, peak: float, world: World = ALONE, *, tokens: int) -> None:
        self._plan, self._world = plan, world
        self._peak = peak
        self._on_cuda = plan.hardware.kind == "cuda"
        self._tokens = tokens
        self._seconds = 0.0
        self._steps = 0
        self._begin = self._mark = time.perf_counter()
        self._seconds_per_step = 0.0

    def count(self) -> None:
        """Count a step that was taken."""
        self._steps += 1

    def go_on_from(self, tokens: int) -> None:
        """Measure from now on, after a return to a state of so many tokens."""
        self._mark, self._tokens, self._steps = time.perf_counter(), tokens, 0

    @contextmanager
    def paused(self) -> Iterator[None]:
        """Leave out the time of what is done inside."""
        begin = time.perf_counter()
        yield
        self._mark += time.perf_counter() - begin
        self._begin += time.perf_counter() - begin

    def due(self, result: StepResult, step: int, tokens: int, skipped: int) -> Due:
        """Note what is known of a step's row before the device has taken the step. All ranks must call it."""
        steps, self._steps = self._steps, 0
        host = self._world.sum_on_host(host_bytes_peak())
        return Due(result, step, tokens, skipped, steps, *self._device_bytes(), host)

    def row_of(self, due: Due) -> dict[str, Any]:
        """Return a metrics row, once the device has taken its step; rates are means over the steps since the last row.

        `loss` is in full precision. `mfu` and `hfu` are against the matrix-product rate measured on this device. The
        memory of devices is the largest of any rank, that of the host is the sum of this host's ranks.
        """
        found = due.result.numbers
        now = time.perf_counter()
        seconds, new_tokens = max(now - self._mark, 1e-9), due.tokens - self._tokens
        flops = self._plan.flops_per_token * new_tokens / seconds
        self._seconds_per_step = seconds / max(1, due.steps)
        self._mark, self._tokens = now, due.tokens
        return {
            "step": due.step,
            "tokens": due.tokens,
            "loss": found.loss,
            **found.parts,
            "grad_norm": found.grad_norm,
            "learning_rate": due.result.learning_rate,
            "tokens_per_second": new_tokens / seconds,
            "model_flops_per_second": flops,
            "mfu": flops / self._peak,
            "hfu": flops / self._peak,
            "allocated_bytes_peak": due.allocated,
            "reserved_bytes_peak": due.reserved,
            "host_bytes_peak": due.host_bytes_peak,
            "loss_scale": found.loss_scale,
            "skipped": due.skipped,
            "seconds": now - self._begin,
        }

    def _device_bytes(self) -> tuple[int | None, int | None]:
        if not self._on_cuda:
            return None, None
        peaks = self._world.max([torch.cuda.max_memory_allocated(), torch.cuda.max_memory_reserved()])
        return int(peaks[0]), int(peaks[1])

    def seconds_left(self, steps: int) -> float:
        """Return how long so many steps will take at the pace of the last row."""
        return steps * self._seconds_per_step
