"""Real steps of an engine under torch's profiler: what they hold by cause and block, and how long they take."""

from __future__ import annotations

import statistics
import time
from collections.abc import Callable, Iterator, Sequence
from contextlib import nullcontext
from dataclasses import dataclass
from itertools import islice
from typing import Any

import torch
from torch import nn

from bigtrain.batch import Batch
from bigtrain.engine import Engine
from bigtrain.memory.attribute import attribute, causes_at_peak, until_peak
from bigtrain.memory.marks import STEP, mark, mark_gradients, marked, tensors_kept
from bigtrain.memory.measure import record
from bigtrain.memory.record import Recording
from bigtrain.memory.report import MemoryReport
from bigtrain.memory.trace_model import called
from bigtrain.profiling.settled import collectives_settled
from bigtrain.training.runtime import host_bytes_peak, seed_step

LEAST_STEPS = 3
"""The first step makes the optimizer's states, the second is the first to find them; the third is like all others."""
TIMED_STEPS = 3
"""Steps taken afterwards for their time, without the profiler, which slows them down."""


@dataclass(frozen=True)
class Measured:
    """What real steps held and took. `recording` ends with the step that has the peak; `step` is the mark of it."""

    memory: MemoryReport
    recording: Recording
    step: str
    step_seconds: float


@dataclass(frozen=True)
class Steps:
    """Steps to be taken: on a kind of device, with batches that do not run out.

    `blocks` names the parts of a model by which memory is told apart, `forward` makes a loss of model and micro-batch.
    `max_norm` is for `Engine.step`, `head` for
    `memory.attribute.attribute`. `seed` is that of the recipe.
    """

    build: Callable[[], Engine]
    batches: Iterator[Batch]
    blocks: Callable[[nn.Module], Sequence[nn.Module]]
    device: str
    seed: int = 0
    max_norm: float | None = 1.0
    head: tuple[int, int] | None = None
    forward: Callable[[nn.Module, Any], Any] = called

    def measure(self, count: int = LEAST_STEPS) -> Measured:
        """Build the engine and take so many steps, watching all that is allocated from before there are weights.

        On CUDA `device_bytes_peak` holds what is on the device beside the allocator at the end, other processes' too.
        """
        if self.device == "cuda":
            torch.cuda.empty_cache()
            torch.cuda.reset_peak_memory_stats()
        engines: list[Engine] = []
        trace = record(lambda: self._build_and_take(engines, count), device=self.device)
        engine = engines.pop()
        kept = tensors_kept(engine.model, engine.optimizer, self._names(engine.model), engine.parameters)
        whole = attribute(trace, kept, head=self.head)
        memory = memory_report(causes_at_peak(whole), self.device)
        recording, step = until_peak(whole)
        return Measured(memory, recording, step, self._time(engine, first=count))

    def _build_and_take(self, engines: list[Engine], count: int) -> None:
        engine = self.build()
        engines.append(engine)
        names = self._names(engine.model)
        settled = collectives_settled() if self.device == "cpu" and engine.world.size > 1 else nullcontext()
        with settled, marked(engine.model, names):
            for number, batch in enumerate(islice(self.batches, count)):
                with mark(f"{STEP}{number}"):
                    self._take(engine, batch, number, names)

    def _take(self, engine: Engine, batch: Batch, number: int, names: Sequence[str]) -> None:
        """Take a step as the shipped loop does: each output goes before the next micro-batch comes."""
        seed_step(self.seed, number, engine.spread.reader)
        batches, outputs = engine.micro_batches(batch), []
        while True:
            with mark("forward"):
                micro = next(batches, None)
                if micro is None:
                    break
                outputs.append(self.forward(engine.model, micro))
            with mark("backward"):
                engine.backward(outputs.pop())
                mark_gradients(engine.model, names)
        with mark("update"):
            engine.step(self.max_norm)

    def _time(self, engine: Engine, *, first: int) -> float:
        """Return the median time of further steps."""
        seconds = []
        for number, batch in enumerate(islice(self.batches, TIMED_STEPS), first):
            begin = self._now()
            self._take(engine, batch, number, ())
            seconds.append(self._now() - begin)
        return statistics.median(seconds)

    def _now(self) -> float:
        if self.device == "cuda":
            torch.cuda.synchronize()
        return time.perf_counter()

    def _names(self, model: nn.Module) -> list[str]:
        names = {id(module): name for name, module in model.named_modules()}
        return [names[id(block)] for block in self.blocks(model)]


def memory_report(by_cause: dict[str, int], device: str) -> MemoryReport:
    """Return a measured report: with the causes what allocator, device and host held at most in this process."""
    resident = host_bytes_peak()
    if device != "cuda":
        return MemoryReport(by_cause, sum(by_cause.values()), resident, resident)
    free, total = torch.cuda.mem_get_info()
    beside = total - free - torch.cuda.memory_reserved()
    reserved = torch.cuda.max_memory_reserved()
    return MemoryReport(by_cause, reserved, reserved + beside, resident)
