"""Signals that ask a run to stop, noted by who started its processes. No torch here."""

from __future__ import annotations

import signal
import threading
from collections.abc import Iterator
from contextlib import contextmanager
from types import FrameType

FORWARDED = (signal.SIGTERM, signal.SIGINT, signal.SIGUSR1)
"""What asks to save and stop; SIGUSR1 is what Slurm sends before the time limit."""


class Stopped(Exception):
    """A signal came while no training process was there to be told."""

    def __init__(self, number: int) -> None:
        super().__init__(signal.Signals(number).name)
        self.number = signal.Signals(number)


class Stops:
    """What this process was asked by signals, in their order. While `waiting` is set, one raises Stopped at once."""

    def __init__(self) -> None:
        self.asked: list[int] = []
        self.waiting = True

    @contextmanager
    def noted(self) -> Iterator[None]:
        """Note signals as long as this lasts, and put the handlers back afterwards; only a main thread has any."""
        main = threading.current_thread() is threading.main_thread()
        before = {number: signal.signal(number, self._note) for number in FORWARDED} if main else {}
        try:
            yield
        finally:
            for number, handler in before.items():
                signal.signal(number, handler)

    def check(self) -> None:
        """Raise Stopped if a signal has come."""
        if self.asked:
            raise Stopped(self.asked[0])

    def _note(self, number: int, _frame: FrameType | None) -> None:
        self.asked.append(number)
        if self.waiting:
            raise Stopped(number)
