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
    """The most bytes of tensors that are alive at once during a step of one rank, and what they are."""

    by_cause: Mapping[str, int]

    @property
    def allocated_bytes_peak(self) -> int:
        return sum(self.by_cause.values())


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
