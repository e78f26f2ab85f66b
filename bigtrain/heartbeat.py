"""What a training process is at, told to the process that started it through a few bytes of shared memory. No torch.

A beat costs about a microsecond: it is written at each phase of each micro-batch and around each exchange of ranks.
"""

from __future__ import annotations

import faulthandler
import mmap
import os
import signal
import struct
import tempfile
import threading
from collections.abc import Iterator, MutableMapping
from contextlib import contextmanager
from typing import NamedTuple

from bigtrain.fault_points import reached

VARIABLE = "BIGTRAIN_HEARTBEAT"
"""Numbers of a file to beat in, of a slot in it, and of a file for stacks: who starts a process and watches sets it."""

PHASES = ("starting", "start", "data", "forward", "backward", "update", "save", "evaluate")
"""starting: before the first beat. start: the ranks have met. The others are the points of `fault_points`."""

BETWEEN_STEPS = ("starting", "start", "save", "evaluate")
"""Phases after the step that they name, not in the one that follows it."""

STACKS_SIGNAL = signal.SIGQUIT
"""What has a process write its stacks down, whatever its Python is at; a terminal sends it to the launcher alone."""

LATER_SECONDS = 5.0
"""How much later than who watches the ranks themselves give up: their errors would hide who does not answer."""

_SLOT_BYTES = 64
_RECORD = struct.Struct("=QQB")


class Beat(NamedTuple):
    """The last sign of life: how many there have been, and in which phase of which step."""

    number: int
    step: int
    phase: str

    def place(self) -> str:
        """Say where that was, for people; steps count from 1, as in the metrics."""
        if self.phase in BETWEEN_STEPS[:2]:
            return f"starting, at step {self.step}"
        if self.phase in BETWEEN_STEPS:
            return f"{self.phase} after step {self.step}"
        return f"{self.phase} of step {self.step + 1}"


class Beats:
    """The shared memory of so many processes, as who starts them sees it; they inherit the file `number`."""

    def __init__(self, count: int) -> None:
        self.number = _nameless_file()
        os.ftruncate(self.number, count * _SLOT_BYTES)
        self._memory = mmap.mmap(self.number, count * _SLOT_BYTES)

    def read(self, index: int) -> Beat:
        """Return the last beat of one of the processes."""
        count, step, phase = _RECORD.unpack_from(self._memory, index * _SLOT_BYTES)
        return Beat(count, step, PHASES[phase])

    def close(self) -> None:
        """Give the memory back."""
        self._memory.close()
        os.close(self.number)


class _Heart:
    """This process's own slot."""

    def __init__(self, number: int, index: int) -> None:
        self._memory = mmap.mmap(number, (index + 1) * _SLOT_BYTES)
        self._offset = index * _SLOT_BYTES
        self._count = self._step = self._phase = 0

    def enter(self, phase: str, step: int) -> None:
        self._step, self._phase = step, PHASES.index(phase)
        self.beat()

    def beat(self) -> None:
        self._count += 1
        _RECORD.pack_into(self._memory, self._offset, self._count, self._step, self._phase)


_whose: list[int | None] = [threading.main_thread().ident]
"""The threads that beat, as `left_to` was nested; the last one does."""

_hearts: list[_Heart] = []
"""One where who started this process watches it, else none."""


def begin(environment: MutableMapping[str, str]) -> None:
    """Let this process beat, and write its stacks down when asked, if the environment says that somebody watches."""
    told = environment.pop(VARIABLE, None)
    if told is None:
        return
    number, index, stacks = map(int, told.split(":"))
    _hearts[:] = [_Heart(number, index)]
    faulthandler.register(STACKS_SIGNAL, file=stacks, all_threads=True)


def enter(phase: str, step: int) -> None:
    """Note that a phase of a step begins; what a test asks for at this point happens then."""
    for heart in _hearts:
        heart.enter(phase, step)
    reached(phase, step)


def beat() -> None:
    """Show that this process goes on, within a phase that may take long."""
    for heart in _hearts:
        heart.beat()


@contextmanager
def exchange() -> Iterator[None]:
    """Beat before and after something that all ranks do together: the one that is behind is the one that hangs.

    Another thread's exchanges are no sign of life of the main one, unless it waits for that thread.
    """
    beating = _hearts if threading.get_ident() == _whose[-1] else []
    for heart in beating:
        heart.beat()
    yield
    for heart in beating:
        heart.beat()


@contextmanager
def left_to(thread: int | None) -> Iterator[None]:
    """Have only the exchanges of a thread, by its number, count as signs of life; None: none of them do."""
    _whose.append(thread)
    try:
        yield
    finally:
        _whose.pop()


def collective_seconds(timeout_seconds: float) -> float:
    """Return how long a rank waits for the others by itself: longer than who watches it does."""
    return timeout_seconds + LATER_SECONDS if _hearts else timeout_seconds


def _nameless_file() -> int:
    """Return a file without a name: in memory where there is such a thing, so that no beat ever waits for a disk."""
    if hasattr(os, "memfd_create"):
        return os.memfd_create("bigtrain-heartbeat")
    with tempfile.TemporaryFile() as file:
        return os.dup(file.fileno())
