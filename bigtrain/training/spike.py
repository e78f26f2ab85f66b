"""A spike of the loss: one far above those of the steps before it. A pure function of what is in a checkpoint."""

from __future__ import annotations

import math
from collections.abc import Mapping
from statistics import median
from typing import Any

WINDOW = 100
"""Steps whose losses say what is usual; before there are so many, nothing is a spike."""

DEVIATIONS = 10.0
"""How far above the median of those a loss must be, in robust standard deviations."""

LEAST_RISE = 0.5
"""And at least so far, in nats: where losses hardly differ, deviations are small."""

NORMAL = 1.4826
"""The standard deviation of normal numbers over their median absolute deviation."""

MOST_ROLLBACKS = 3
"""So many times a run goes back without getting past the step of the spike."""


class Spikes:
    """Tell which losses are spikes, and remember what was done about them.

    Losses are those of the global batch, the same on every rank, in the order of the steps. One that is a spike, or not
    finite, does not count towards what is usual.
    """

    def __init__(self, kept: Mapping[str, Any] | None = None) -> None:
        """Begin anew, or where `state` was taken."""
        kept = kept or {}
        self._losses: list[float] = list(kept.get("losses", []))
        self._rollbacks: int = kept.get("rollbacks", 0)
        self._beyond: int = kept.get("beyond", 0)
        self.left_out: list[list[int]] = [list(rows) for rows in kept.get("left_out", [])]
        """The first and the last place in the stream of rows of what was left out, each time."""

    @property
    def limit(self) -> float:
        """Return the largest loss that is not a spike at the next step; infinite while too few are known."""
        if len(self._losses) < WINDOW:
            return math.inf
        usual = median(self._losses)
        spread = NORMAL * median(abs(loss - usual) for loss in self._losses)
        return usual + max(DEVIATIONS * spread, LEAST_RISE)

    def add(self, loss: float, step: int) -> bool:
        """Take the loss of the step that made `step` steps; return whether it is a spike."""
        if not math.isfinite(loss):
            return False
        if loss > self.limit:
            return True
        self._losses = [*self._losses, loss][-WINDOW:]
        if step >= self._beyond:
            self._rollbacks = 0
        return False

    @property
    def may_go_back(self) -> bool:
        """Tell whether the run may go back from a spike once more."""
        return self._rollbacks < MOST_ROLLBACKS

    def gone_back(self, before: Spikes, step: int, rows: tuple[int, int]) -> None:
        """After a return to an earlier state: remember what `before` knew, the spike's step, and the rows left out."""
        self._rollbacks = before._rollbacks + 1
        self._beyond = max(before._beyond, step)
        self.left_out = [*before.left_out, list(rows)]

    def state(self) -> dict[str, Any]:
        """Return what a checkpoint keeps of it, as JSON; numbers come back bit by bit."""
        return {
            "losses": self._losses,
            "rollbacks": self._rollbacks,
            "beyond": self._beyond,
            "left_out": self.left_out,
        }
