"""Metrics rows on a GPU are read a step late: by then the device has taken the step, and the host need not wait."""

from __future__ import annotations

from collections.abc import Callable

import torch

from bigtrain.training.meter import Due


def reads_late(device: torch.device) -> bool:
    """Tell whether a step's numbers are read when the next one is enqueued: a GPU would wait for the host otherwise."""
    return device.type == "cuda"


class LateRows:
    """The row that is due, until the next step is enqueued, or something waits for the device anyway.

    Before a checkpoint, an evaluation and the end it must be settled, so that the metrics have every row that a
    checkpoint's run had. Where nothing is `late`, it is told at once.
    """

    def __init__(self, tell: Callable[[Due], None], *, late: bool) -> None:
        self._tell, self._late = tell, late
        self._due: Due | None = None

    def add(self, due: Due) -> None:
        """Take a row that is due."""
        self._due = due
        if not self._late:
            self.settle()

    def settle(self) -> None:
        """Tell the row that is due, if there is one; waits for the device if it has not taken that step."""
        if self._due is not None:
            due, self._due = self._due, None
            self._tell(due)
