"""When a process counts as stuck: beats, processor time and disks are played here, and so is the clock."""

from __future__ import annotations

import os

import pytest

from bigtrain import heartbeat, watchdog
from bigtrain.activity import Activity
from bigtrain.heartbeat import VARIABLE, Beat
from bigtrain.watchdog import Watchdog, Watched

TIMEOUT = 60.0


class Played:
    """Two processes whose lives a test plays, and the time that passes."""

    def __init__(self, monkeypatch: pytest.MonkeyPatch) -> None:
        self.now = 1000.0
        self.beats = [Beat(1, 1, "forward"), Beat(1, 1, "forward")]
        self.does: list[Activity | None] = [Activity(5.0, False, False), Activity(5.0, False, False)]
        monkeypatch.setattr(watchdog.time, "monotonic", lambda: self.now)
        monkeypatch.setattr(watchdog, "activity", lambda process: self.does[process])
        self.watchdog = Watchdog(self, [0, 1], TIMEOUT)  # type: ignore[arg-type]

    def read(self, index: int) -> Beat:
        return self.beats[index]

    def stuck_after(self, seconds: float, each: float = 1.0, *, computing: float = 0.0, beating: bool = False) -> bool:
        """Tell whether one is found to be stuck while so much time passes; the second of them lives that long."""
        found = False
        for _ in range(round(seconds / each)):
            self.now += each
            if self.does[1] is not None:
                self.does[1] = self.does[1]._replace(seconds=self.does[1].seconds + computing * each)
            if beating:
                self.beats[1] = self.beats[1]._replace(number=self.beats[1].number + 1)
            found = found or self.watchdog.look()
        return found


@pytest.fixture
def played(monkeypatch: pytest.MonkeyPatch) -> Played:
    return Played(monkeypatch)


def alone(played: Played) -> None:
    """Let the first process end, so that the second alone counts."""
    played.does[0] = None


def test_without_a_sign_of_life_for_the_timeout_one_is_stuck(played: Played) -> None:
    played.stuck_after(2)
    assert not played.stuck_after(TIMEOUT - 2)
    assert played.stuck_after(3)


def test_one_that_waits_is_stuck_although_the_other_computes(played: Played) -> None:
    assert played.stuck_after(TIMEOUT + 3, computing=1.0)
    first, second = played.watchdog.quiet_seconds()
    assert first >= TIMEOUT > second


@pytest.mark.parametrize("life", [{"computing": 0.05}, {"beating": True}])
def test_one_that_computes_or_beats_is_not(played: Played, life: dict[str, float]) -> None:
    alone(played)
    assert not played.stuck_after(20 * TIMEOUT, **life)  # type: ignore[arg-type]


def test_a_disk_is_waited_for_however_slow(played: Played) -> None:
    alone(played)
    played.does[1] = Activity(5.0, True, False)
    assert not played.stuck_after(20 * TIMEOUT)


def test_what_wakes_up_and_does_nothing_is_no_life(played: Played) -> None:
    alone(played)
    assert played.stuck_after(TIMEOUT + 3, computing=0.002)


def test_before_the_first_phase_only_a_stopped_one_is_found(played: Played) -> None:
    alone(played)
    played.beats[1] = Beat(0, 0, "starting")
    assert not played.stuck_after(5 * TIMEOUT)
    played.does[1] = Activity(5.0, False, True)
    assert played.stuck_after(TIMEOUT + 3)


def test_ended_ones_are_nobodys_business(played: Played) -> None:
    played.does = [None, None]
    assert not played.stuck_after(5 * TIMEOUT)


def test_who_was_stopped_itself_starts_anew(played: Played) -> None:
    played.stuck_after(TIMEOUT - 10)
    played.now += 10 * TIMEOUT
    assert not played.stuck_after(TIMEOUT - 10)
    assert played.stuck_after(20)


def test_looks_are_rare(played: Played, monkeypatch: pytest.MonkeyPatch) -> None:
    looks: list[int] = []
    monkeypatch.setattr(watchdog, "activity", lambda process: looks.append(process))
    played.stuck_after(2, each=0.02)
    assert len(looks) <= 2 * 8


def test_what_is_inherited_is_given_back() -> None:
    watched = Watched(2, TIMEOUT)
    told, files = watched.inherited(1)
    assert told[VARIABLE] == f"{files[0]}:1:{files[1]}"
    assert watched.look() is None
    watched.begin([os.getpid(), os.getpid()], 4)
    assert watched.look() is None
    watched.close()
    with pytest.raises(OSError, match="Bad file descriptor"):
        os.fstat(files[0])
    assert not heartbeat._hearts


def test_one_whose_ended_children_count_no_more_is_not_idle_until_it_has_made_up_for_them(played: Played) -> None:
    alone(played)
    played.does[1] = Activity(500.0, False, False)
    played.stuck_after(2, computing=1.0)
    played.does[1] = Activity(3.0, False, False)
    assert not played.stuck_after(3 * TIMEOUT, computing=0.5)


def test_threads_that_only_wake_up_do_not_hide_a_hang(played: Played) -> None:
    alone(played)
    played.stuck_after(2)
    assert played.stuck_after(TIMEOUT + 3, computing=0.015)
