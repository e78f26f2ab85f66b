"""When steps end, what their losses were, and the memory they took."""

from __future__ import annotations

import itertools
import statistics
import time
from typing import Any

from arms.job import WARM_UP_STEPS


class Clock:
    """Notes the end of each step and its loss; on CUDA by events, so that nobody waits for the device.

    The first steps are warm-up; the peak of a device's memory counts them too.
    """

    def __init__(self, kind: str, steps: int) -> None:
        self._on_cuda = kind == "cuda"
        self._timed = steps
        self._ends: list[Any] = []
        self._losses: list[Any] = []

    @property
    def steps(self) -> int:
        """Return how many steps to take: those to be timed and the warm-up."""
        return self._timed + WARM_UP_STEPS

    def step(self, loss: Any) -> bool:
        """Note the end of a step and its mean loss; return whether it was the last one."""
        self._losses.append(loss.detach().clone() if hasattr(loss, "detach") else loss)
        self._ends.append(self._now())
        return len(self._ends) >= self.steps

    def result(self, tokens: list[int]) -> dict[str, Any]:
        """Return what was found of the timed steps; `tokens` are the real ones, not padding, of every step taken.

        `losses` are those of every step, the warm-up's first.
        """
        from bigtrain.training.runtime import host_bytes_peak

        seconds, timed_tokens = self._seconds()[-self._timed :], tokens[WARM_UP_STEPS : self.steps]
        losses = [float(loss) for loss in self._losses]
        rates = [count / one for count, one in zip(timed_tokens, seconds, strict=True)]
        return {
            "seconds_per_step": statistics.median(seconds),
            "tokens_per_second": statistics.median(rates),
            "step_seconds": seconds,
            "tokens": timed_tokens,
            "losses": losses,
            "loss_first": losses[WARM_UP_STEPS],
            "loss_last": losses[-1],
            "host_bytes_peak": host_bytes_peak(),
            "allocated_bytes_peak": self._allocated(),
        }

    def _now(self) -> Any:
        if not self._on_cuda:
            return time.perf_counter()
        import torch

        event = torch.cuda.Event(enable_timing=True)  # type: ignore[no-untyped-call]
        event.record()
        return event

    def _seconds(self) -> list[float]:
        pairs = list(itertools.pairwise(self._ends))
        if not self._on_cuda:
            return [end - begin for begin, end in pairs]
        import torch

        torch.cuda.synchronize()
        return [begin.elapsed_time(end) / 1000 for begin, end in pairs]

    def _allocated(self) -> int | None:
        if not self._on_cuda:
            return None
        import torch

        return torch.cuda.max_memory_allocated()
