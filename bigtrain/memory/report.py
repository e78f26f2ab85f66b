"""Bytes held in a step: at its peak by cause, and from beginning to end."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass

CAUSES = (
    "weights",
    "master_weights",
    "gradients",
    "optimizer_state",
    "activations",
    "logits",
    "temporaries",
    "communication",
)
"""What memory is held for. `activations` wait for the backward pass; `temporaries` live within an operation."""


@dataclass(frozen=True)
class MemoryReport:
    """The most bytes that one rank holds during a step, at any moment; None is not known.

    `by_cause` is of live tensors at their peak. The allocator reserves more (on a CPU nothing); with the device's
    context and what libraries hold there it is `device_bytes_peak`, which a memory budget bounds: on a CPU the resident
    bytes of the process. `host_bytes_peak` is resident host memory.
    """

    by_cause: Mapping[str, int]
    reserved_bytes_peak: int | None = None
    device_bytes_peak: int | None = None
    host_bytes_peak: int | None = None

    @property
    def allocated_bytes_peak(self) -> int:
        return sum(self.by_cause.values())

    def as_object(self) -> dict[str, object]:
        """Return what `bigtrain plan --json` prints as `memory`."""
        return {
            "allocated_bytes_peak": self.allocated_bytes_peak,
            "reserved_bytes_peak": self.reserved_bytes_peak,
            "device_bytes_peak": self.device_bytes_peak,
            "host_bytes_peak": self.host_bytes_peak,
            "by_cause": {cause: self.by_cause.get(cause, 0) for cause in CAUSES},
        }


@dataclass(frozen=True)
class Timeline:
    """Bytes of tensors that are alive, beyond those that were before: after each allocation and release, in order."""

    timeline: tuple[int, ...]

    @property
    def peak_bytes(self) -> int:
        return max(self.timeline, default=0)

    @property
    def end_bytes(self) -> int:
        return self.timeline[-1] if self.timeline else 0
