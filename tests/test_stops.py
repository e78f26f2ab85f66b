"""Signals that ask to stop: noted while something runs, raised while nothing does."""

from __future__ import annotations

import os
import signal
import threading
from signal import SIGTERM, SIGUSR1

import pytest

from bigtrain.stops import FORWARDED, Stopped, Stops


def test_while_nothing_runs_a_signal_is_raised() -> None:
    stops = Stops()
    with pytest.raises(Stopped, match="^SIGUSR1$") as raised, stops.noted():
        os.kill(os.getpid(), SIGUSR1)
        signal.pause()
    assert raised.value.number == SIGUSR1
    assert stops.asked == [SIGUSR1]


def test_while_something_runs_they_are_noted_in_order() -> None:
    stops, before = Stops(), [signal.getsignal(number) for number in FORWARDED]
    stops.waiting = False
    with stops.noted():
        stops.check()
        for number in (SIGTERM, SIGUSR1):
            signal.raise_signal(number)
    assert stops.asked == [SIGTERM, SIGUSR1]
    assert [signal.getsignal(number) for number in FORWARDED] == before
    with pytest.raises(Stopped, match="SIGTERM"):
        stops.check()


def test_another_thread_has_no_signals() -> None:
    def note() -> None:
        with Stops().noted():
            seen.append(signal.getsignal(SIGTERM))

    seen: list[object] = []
    thread = threading.Thread(target=note)
    thread.start()
    thread.join()
    assert seen == [signal.getsignal(SIGTERM)]
