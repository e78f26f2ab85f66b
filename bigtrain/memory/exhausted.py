"""Out of memory, in words: who holds what at that moment, by cause and block, and where the step was."""

from __future__ import annotations

import re
from collections import Counter
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from itertools import groupby
from types import FrameType, TracebackType

import torch
from torch import nn
from torch.optim import Optimizer

from bigtrain.memory.marks import address, place_of, tensors_in, tensors_kept
from bigtrain.memory.report import MemoryReport
from bigtrain.units import BYTE_UNITS, format_bytes

CPU_ALLOCATOR = "DefaultCPUAllocator: can't allocate memory"
REQUESTED = re.compile(r"tried to allocate ([\d.]+)\s*(bytes|[KMGT]iB)", re.IGNORECASE)
"""How torch says what was asked for, on the CPU and on CUDA."""
PHASES = {"Engine.backward": "backward", "Engine.step": "update"}
"""What a step was doing, by the function that was running; anything else is its forward."""


@dataclass(frozen=True)
class Exhausted:
    """What was held when memory ran out: `known` bytes by cause and place, `held` in all, `requested` on top.

    `held_bytes` is what the caching allocator had allocated at most, on a CPU what the process had resident at most:
    the rest beyond what is known are activations, logits and temporaries, on a CPU also libraries.
    """

    known: Mapping[tuple[str, str], int]
    held_bytes: int
    requested_bytes: int
    where: str
    device: str

    @property
    def needed_bytes(self) -> int:
        """Return what would have been held, had it been there."""
        return self.held_bytes + self.requested_bytes

    def predicted_bytes(self, predicted: MemoryReport) -> int:
        """Return what was predicted of the same kind: allocated bytes, on a CPU resident ones where they are known."""
        if self.device == "cpu" and predicted.host_bytes_peak is not None:
            return predicted.host_bytes_peak
        return predicted.allocated_bytes_peak

    def lines(self, predicted: MemoryReport) -> list[str]:
        """Return what happened, who held what, and how that compares with the prediction."""
        kind = "resident" if self.device == "cpu" else "allocated"
        asked = f"{format_bytes(self.requested_bytes)} more were" if self.requested_bytes else "more was"
        return [
            f"out of memory in the {self.where}: {asked} asked for with {format_bytes(self.held_bytes)} {kind}",
            f"held by cause: {_listed(self._by_cause())}",
            f"held by block, for good: {_listed(grouped(self._by_place()))}",
            self._beside(predicted),
        ]

    def _by_cause(self) -> list[tuple[str, int]]:
        sums: Counter[str] = Counter()
        for (cause, _), size in self.known.items():
            sums[cause] += size
        rest = max(0, self.held_bytes - sum(sums.values()))
        what = "activations, logits, temporaries" + (", libraries" if self.device == "cpu" else "")
        return [*sums.most_common(), (f"the rest ({what})", rest)]

    def _by_place(self) -> list[tuple[str, int]]:
        sums: Counter[str] = Counter()
        for (_, place), size in self.known.items():
            sums[place or "outside of the blocks"] += size
        return list(sums.items())

    def _beside(self, predicted: MemoryReport) -> str:
        """Say how far the prediction was off, or that something else took the memory."""
        peak, needed = self.predicted_bytes(predicted), self.needed_bytes
        causes = _listed([(cause, size) for cause, size in predicted.by_cause.items() if size])
        if needed > peak:
            off = f"too low by at least {format_bytes(needed - peak)} ({needed / peak - 1:.1%})"
        else:
            off = "not reached: less was there than the budget; see what else uses memory, or lower memory.budget"
        return f"predicted: a peak of {format_bytes(peak)} ({causes}); {off}"


def is_out_of_memory(error: BaseException) -> bool:
    """Tell whether an error says that memory could not be allocated, by torch's allocator of a GPU or of the host."""
    return isinstance(error, torch.OutOfMemoryError) or CPU_ALLOCATOR in str(error)


def exhausted(
    error: RuntimeError,
    model: nn.Module,
    optimizer: Optimizer,
    blocks: Sequence[str],
    *,
    device: str,
    resident_bytes: int,
) -> Exhausted:
    """Return who holds what after an error that `is_out_of_memory`; `resident_bytes` is the process's peak."""
    sizes = _sizes(model, optimizer)
    causes = tensors_kept(model, optimizer, blocks)
    known: Counter[tuple[str, str]] = Counter()
    for begin, cause_and_place in causes.items():
        known[cause_and_place] += sizes[begin]
    for name, parameter in model.named_parameters():
        if parameter.grad is not None:
            known["gradients", place_of(name, blocks)] += parameter.grad.untyped_storage().nbytes()
    held = torch.cuda.max_memory_allocated() if device == "cuda" else resident_bytes
    modules = {id(model.get_submodule(name)): name for name in blocks}
    where = _where(error.__traceback__, modules)
    return Exhausted(dict(known), held, requested_bytes(str(error)), where, device)


def requested_bytes(text: str) -> int:
    """Return the bytes that could not be allocated, as torch's message says; 0 where it does not."""
    found = REQUESTED.search(text)
    if found is None:
        return 0
    unit = 1 if found[2].lower() == "bytes" else BYTE_UNITS[found[2]]
    return round(float(found[1]) * unit)


def grouped(places: Sequence[tuple[str, int]]) -> list[tuple[str, int]]:
    """Return places with their bytes, neighbours that hold the same as one: `blocks.0 to blocks.23, each`."""
    found = []
    for size, group in groupby(places, key=lambda place: place[1]):
        names = [name for name, _ in group]
        found.append((names[0] if len(names) == 1 else f"{names[0]} to {names[-1]}, each", size))
    return found


def _sizes(model: nn.Module, optimizer: Optimizer) -> dict[int, int]:
    """Return the bytes of weights and optimizer states by their addresses."""
    states = [tensor for state in optimizer.state.values() for tensor in tensors_in(state)]
    tensors = [*model.parameters(), *model.buffers(), *states]
    return {address(tensor): tensor.untyped_storage().nbytes() for tensor in tensors}


def _where(traceback: TracebackType | None, modules: Mapping[int, str]) -> str:
    """Return what the step was doing and the innermost block whose Python code was running, from the error's frames."""
    phase, block = "forward", ""
    for frame in _frames(traceback):
        phase = PHASES.get(frame.f_code.co_qualname, phase)
        block = modules.get(id(frame.f_locals.get("self")), block)
    return f"{phase} of {block}" if block else phase


def _frames(traceback: TracebackType | None) -> Iterator[FrameType]:
    while traceback is not None:
        yield traceback.tb_frame
        traceback = traceback.tb_next


def _listed(sizes: Sequence[tuple[str, int]]) -> str:
    return ", ".join(f"{name} {format_bytes(size)}" for name, size in sizes) or "nothing"
