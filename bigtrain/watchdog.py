"""Which processes have stopped making progress without having ended. No torch here.

A process counts as stuck once it has neither beaten, nor computed, nor waited for a disk for a time. So one that takes
minutes for a phase is left alone, and one that computes for ever is not found: nothing tells it from the first.
"""

from __future__ import annotations

import tempfile
import time
from collections.abc import Sequence
from dataclasses import dataclass

from bigtrain.activity import Activity, activity
from bigtrain.hang import Hang, examine
from bigtrain.heartbeat import PHASES, VARIABLE, Beats

LOOK_SECONDS = 0.25
"""How often is looked; a look reads a few small files of each process that has not beaten since the last one."""

BLIND_SECONDS = 5.0
"""After so long between two looks this very process was stopped, and nothing before counts."""

IDLE_SECONDS, IDLE_SHARE = 0.05, 0.04
"""What a process may use of a processor and still count as idle: gloo's thread and ours wake up again and again, for
1% together; one that computes gets more even where ten share a core.
"""

UNSEEN = PHASES[0]
"""Before its first phase a process may wait for whatever it likes, as trackers do for a network."""


@dataclass
class _Mark:
    """When a process last showed life, and what it had computed by then."""

    at: float
    count: int = 0
    seconds: float = 0.0


class Watchdog:
    """Looks after processes that beat; `look` is to be called again and again."""

    def __init__(self, beats: Beats, processes: Sequence[int], timeout_seconds: float) -> None:
        self._beats, self._processes, self._timeout_seconds = beats, list(processes), timeout_seconds
        self._looked = time.monotonic()
        self._marks = [_Mark(self._looked) for _ in self._processes]

    def look(self) -> bool:
        """Tell whether a process is stuck, as of the last look."""
        now = time.monotonic()
        if now - self._looked < LOOK_SECONDS:
            return False
        if now - self._looked > BLIND_SECONDS:
            self._marks = [_Mark(now, mark.count, mark.seconds) for mark in self._marks]
        self._looked = now
        for index in range(len(self._processes)):
            self._mark(index, now)
        return max(self.quiet_seconds()) >= self._timeout_seconds

    def quiet_seconds(self) -> list[float]:
        """Return for how long each process has shown no life."""
        return [self._looked - mark.at for mark in self._marks]

    def _mark(self, index: int, now: float) -> None:
        mark, beat = self._marks[index], self._beats.read(index)
        if beat.number != mark.count:
            self._marks[index] = _Mark(now, beat.number, mark.seconds)
            return
        found = activity(self._processes[index])
        if found is not None:  # less than before where a descendant has ended
            mark.seconds = min(mark.seconds, found.seconds)
        if found is None or (not found.stopped and (beat.phase == UNSEEN or _lives(found, mark, now))):
            self._marks[index] = _Mark(now, beat.number, found.seconds if found else 0.0)


def _lives(found: Activity, mark: _Mark, now: float) -> bool:
    return found.at_disk or found.seconds - mark.seconds > IDLE_SECONDS + IDLE_SHARE * (now - mark.at)


class Watched:
    """Processes that are looked after from their start: what they inherit for it, and what is found."""

    def __init__(self, count: int, timeout_seconds: float) -> None:
        self.timeout_seconds = timeout_seconds
        self._beats = Beats(count)
        self._stacks = [tempfile.TemporaryFile() for _ in range(count)]  # noqa: SIM115 - closed by `close`
        self._watchdog: Watchdog | None = None

    def inherited(self, index: int) -> tuple[dict[str, str], list[int]]:
        """Return the environment of one of the processes, and the files that it is to inherit."""
        number, stacks = self._beats.number, self._stacks[index].fileno()
        return {VARIABLE: f"{number}:{index}:{stacks}"}, [number, stacks]

    def begin(self, processes: Sequence[int], first: int) -> None:
        """Look after these processes, which are ranks from `first` on."""
        self._processes, self._first = list(processes), first
        self._watchdog = Watchdog(self._beats, processes, self.timeout_seconds)

    def look(self, *, now: bool = False) -> Hang | None:
        """Return what is known of a hang, if there is one; `now`: of all processes as they are, hang or not."""
        if self._watchdog is None or not (self._watchdog.look() or now):
            return None
        beats = [self._beats.read(index) for index in range(len(self._processes))]
        stacks = [file.fileno() for file in self._stacks]
        ranks, texts = examine(self._processes, self._first, beats, self._watchdog.quiet_seconds(), stacks)
        return Hang(ranks, texts, self.timeout_seconds)

    def close(self) -> None:
        """Give everything back."""
        self._beats.close()
        for file in self._stacks:
            file.close()
