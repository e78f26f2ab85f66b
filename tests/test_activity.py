"""What the system tells of processes: these compute, sleep, are stopped, have children, or have ended."""

from __future__ import annotations

import os
import signal
import subprocess
import sys
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager

import pytest

from bigtrain.activity import activity, is_known, waits_in

pytestmark = pytest.mark.skipif(not is_known(), reason="needs /proc")

SPIN = "while True: pass"
SLEEP = "import time; time.sleep(60)"


@contextmanager
def process(script: str) -> Iterator[int]:
    started = subprocess.Popen([sys.executable, "-c", script], process_group=0)
    try:
        yield started.pid
    finally:
        os.killpg(started.pid, signal.SIGKILL)
        started.wait()


def wait_for(what: Callable[[], object]) -> None:
    end = time.monotonic() + 60
    while not what():
        assert time.monotonic() < end
        time.sleep(0.02)


def seconds(number: int) -> float:
    found = activity(number)
    assert found is not None
    return found.seconds


def test_one_that_computes_uses_the_processor() -> None:
    with process(SPIN) as number:
        wait_for(lambda: seconds(number) > 0.3)


def test_what_children_compute_counts() -> None:
    child = f"import subprocess, sys; subprocess.run([sys.executable, '-c', {SPIN!r}])"
    with process(child) as number:
        wait_for(lambda: seconds(number) > 0.3)


def test_one_that_sleeps_does_not() -> None:
    with process(SLEEP) as number:
        wait_for(lambda: "nanosleep" in waits_in(number) or not waits_in(number))
        time.sleep(0.5)
        before = seconds(number)
        time.sleep(0.5)
        assert seconds(number) - before <= 0.02
        found = activity(number)
        assert found is not None and not found.at_disk and not found.stopped


def test_one_that_is_stopped_is_told() -> None:
    with process(SPIN) as number:
        os.kill(number, signal.SIGSTOP)
        wait_for(lambda: (found := activity(number)) is not None and found.stopped)


def test_one_that_has_ended_is_nothing() -> None:
    ended = subprocess.Popen([sys.executable, "-c", ""])
    wait_for(lambda: activity(ended.pid) is None)  # a zombie until it is waited for
    ended.wait()
    assert activity(ended.pid) is None
    assert waits_in(ended.pid) == ""
