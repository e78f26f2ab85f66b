"""Which rank makes the others wait: each finds out how long it works itself in a step, and they compare."""

from __future__ import annotations

import platform
import sys
import threading
import time
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from statistics import median
from types import FrameType
from typing import Any, NamedTuple

from bigtrain.world import World

WINDOW = 20
"""Steps after which ranks compare the medians of theirs; one that is slower in two windows running is named."""
LEAST_SECONDS = 0.05
"""So much longer than the others' median a rank must work in a step,"""
LEAST_SHARE = 0.1
"""and by this share of the step,"""
CHANCE = 1.5
"""and by this many times what its own times, or the others', are spread by: steps on a busy machine are uneven.

The median of 20 normal numbers is off by 0.28 standard deviations; the difference of two by 0.4.
"""
NORMAL = 1.4826
"""The standard deviation of normal numbers over their median absolute deviation."""
LOOK_SECONDS = 0.025
"""How often is looked whether the training thread waits for others."""
DEPTH = 4
"""Frames of Python between a blocking operation and the function of torch that waits in it."""
WAITS_IN = "distributed_c10d.py"
"""The file of torch in whose functions a thread waits for other ranks."""


class Straggler(NamedTuple):
    """A rank that works longer than the others in each step, by how much, in seconds."""

    rank: int
    host: str
    seconds: float

    def __str__(self) -> str:
        return f"straggler: rank {self.rank} on {self.host} takes {self.seconds:.3f} s a step longer than the others"


class OwnTime:
    """Measure how long a thread works and does not wait for other ranks, by looking where it is now and then.

    Whatever it does counts, sleeping and reading files included, but not waiting inside of torch.distributed. On a GPU
    that is the host's time alone: kernels, and what they wait for, run on without it.
    """

    def __init__(self) -> None:
        self._thread = threading.get_ident()
        self._end = threading.Event()
        self._paused = False
        self._own = 0.0
        self._looking = threading.Thread(target=self._look, name="straggler", daemon=True)

    def start(self) -> None:
        """Begin to look."""
        self._looking.start()

    def stop(self) -> None:
        """Stop looking."""
        self._end.set()
        if self._looking.is_alive():
            self._looking.join()

    def take(self) -> float:
        """Return the seconds of own work since the last call."""
        own, self._own = self._own, 0.0
        return own

    @contextmanager
    def paused(self) -> Iterator[None]:
        """Leave out what is done inside."""
        self._paused = True
        try:
            yield
        finally:
            self._paused = False

    def _look(self) -> None:
        last = time.perf_counter()
        while not self._end.wait(LOOK_SECONDS):
            now = time.perf_counter()
            if not self._paused and not waits(sys._current_frames().get(self._thread)):
                self._own += now - last
            last = now


def waits(frame: FrameType | None) -> bool:
    """Tell whether a thread that is there waits for other ranks."""
    for _ in range(DEPTH):
        if frame is None:
            return False
        if frame.f_code.co_filename.endswith(WAITS_IN):
            return True
        frame = frame.f_back
    return False


def slowest(own_seconds: Sequence[float], step_seconds: float, spread: float = 0.0) -> tuple[int, float] | None:
    """Return the rank that works longer than the others' median by more than all bounds, and by how many seconds.

    `spread` is the largest standard deviation, in seconds, of a rank's own times.
    """
    rank = max(range(len(own_seconds)), key=own_seconds.__getitem__)
    others = median(seconds for other, seconds in enumerate(own_seconds) if other != rank)
    excess = own_seconds[rank] - others
    return (rank, excess) if excess > max(LEAST_SECONDS, LEAST_SHARE * step_seconds, CHANCE * spread) else None


class Stragglers:
    """Name the rank that makes the others wait, if any does; all ranks call the same, once a step."""

    def __init__(self, world: World, own_time: OwnTime | None = None) -> None:
        self._world = world
        self._own_time = own_time or OwnTime()
        self._own: list[float] = []
        self._steps: list[float] = []
        self._mark = time.perf_counter()
        self._suspect: int | None = None
        self._named: int | None = None

    @contextmanager
    def watched(self) -> Iterator[None]:
        """Look on as long as this lasts; alone there is nothing to look at."""
        if self._world.size == 1:
            yield
            return
        self._own_time.start()
        try:
            yield
        finally:
            self._own_time.stop()

    @contextmanager
    def paused(self) -> Iterator[None]:
        """Leave out what is done inside, such as saving: the first rank has more of it."""
        begin = time.perf_counter()
        with self._own_time.paused():
            yield
        self._mark += time.perf_counter() - begin

    def step(self) -> Straggler | None:
        """Count a step; return who is found to be a straggler by it, once as long as that stays so."""
        if self._world.size == 1:
            return None
        now = time.perf_counter()
        self._own.append(self._own_time.take())
        self._steps.append(now - self._mark)
        self._mark = now
        return self._compared() if len(self._own) == WINDOW else None

    def _compared(self) -> Straggler | None:
        world = self._world
        own, whole = median(self._own), median(self._steps)
        spread = NORMAL * median(abs(seconds - own) for seconds in self._own)
        self._own, self._steps = [], []
        mine = [rank == world.rank for rank in range(world.size)]
        told = world.sum([own * here for here in mine] + [spread * here for here in mine] + [whole / world.size])
        found = slowest(told[: world.size], told[-1], max(told[world.size : -1]))
        rank = found[0] if found else None
        again, self._suspect = rank == self._suspect, rank
        if not again or rank == self._named:
            return None
        self._named = rank
        if found is None:
            return None
        return Straggler(found[0], world.gather(platform.node())[found[0]], found[1])


def row_of(found: Straggler, step: int, tokens: int) -> dict[str, Any]:
    """Return it as a metrics row."""
    told = {"straggler": found.rank, "straggler_host": found.host, "straggler_seconds": found.seconds}
    return {"step": step, "tokens": tokens, **told}
