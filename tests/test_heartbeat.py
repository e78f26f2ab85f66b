"""Beats in shared memory: what a process writes, who started it reads; stacks on a signal."""

from __future__ import annotations

import os
import subprocess
import sys
import tempfile
import threading
from collections.abc import Iterator
from contextlib import nullcontext

import pytest

from bigtrain import fault_points, heartbeat
from bigtrain.fault_points import parse
from bigtrain.heartbeat import PHASES, STACKS_SIGNAL, VARIABLE, Beat, Beats


@pytest.fixture
def beats() -> Iterator[Beats]:
    """Return the shared memory of two processes, of which this one is the second."""
    shared = Beats(2)
    with tempfile.TemporaryFile() as stacks:
        heartbeat.begin({VARIABLE: f"{shared.number}:1:{stacks.fileno()}"})
        yield shared
        heartbeat.faulthandler.unregister(STACKS_SIGNAL)
    heartbeat._hearts.clear()
    shared.close()


def test_nobody_watches_unless_the_environment_says_so() -> None:
    heartbeat.begin({})
    heartbeat.enter("data", 3)
    with heartbeat.exchange():
        pass
    assert not heartbeat._hearts
    assert heartbeat.collective_seconds(60) == 60


def test_a_beat_tells_where_a_process_is(beats: Beats) -> None:
    assert beats.read(1) == Beat(0, 0, "starting")
    heartbeat.enter("backward", 2**40)
    assert beats.read(1) == Beat(1, 2**40, "backward")
    with heartbeat.exchange():
        assert beats.read(1).number == 2
    assert beats.read(1) == Beat(3, 2**40, "backward")
    assert beats.read(0) == Beat(0, 0, "starting")


def test_who_is_watched_waits_longer_than_who_watches(beats: Beats) -> None:
    assert heartbeat.collective_seconds(60) > 62


def test_a_fault_that_a_test_asks_for_comes_after_the_beat(beats: Beats, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(fault_points, "_ASKED", parse("update:raise"))
    with pytest.raises(RuntimeError, match="fault at update"):
        heartbeat.enter("update", 7)
    assert beats.read(1).place() == "update of step 8"


def test_places_are_named_as_in_the_metrics() -> None:
    places = [Beat(1, 4, phase).place() for phase in PHASES]
    assert places[:3] == ["starting, at step 4", "starting, at step 4", "data of step 5"]
    assert places[-2:] == ["save after step 4", "evaluate after step 4"]
    assert set(PHASES[1:]) <= set(fault_points.POINTS)


def test_another_process_beats_and_writes_its_stacks() -> None:
    shared = Beats(1)
    script = (
        "import os; from bigtrain import heartbeat; heartbeat.begin(os.environ); heartbeat.enter('save', 5); "
        f"assert {VARIABLE!r} not in os.environ; os.kill(os.getpid(), {int(STACKS_SIGNAL)})"
    )
    with tempfile.TemporaryFile("w+") as stacks:
        told = {VARIABLE: f"{shared.number}:0:{stacks.fileno()}", "PYTHONPATH": os.pathsep.join(sys.path)}
        files = (shared.number, stacks.fileno())
        subprocess.run([sys.executable, "-c", script], env={**os.environ, **told}, pass_fds=files, check=True)
        stacks.seek(0)
        assert 'File "<string>", line 1 in <module>' in stacks.read()
    assert shared.read(0) == Beat(1, 5, "save")
    shared.close()


def test_without_memory_files_there_is_a_file_without_a_name(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delattr(os, "memfd_create", raising=False)
    shared = Beats(3)
    assert shared.read(2).number == 0
    shared.close()


def test_exchanges_of_another_thread_count_only_where_it_is_waited_for(beats: Beats) -> None:
    def exchanges() -> None:
        with heartbeat.exchange():
            pass

    def in_a_thread(*, left: bool) -> int:
        before, go = beats.read(1).number, threading.Event()
        thread = threading.Thread(target=lambda: go.wait(10) and exchanges())
        thread.start()
        with heartbeat.left_to(thread.ident) if left else nullcontext():
            go.set()
            thread.join()
        return beats.read(1).number - before

    assert in_a_thread(left=False) == 0
    assert in_a_thread(left=True) == 2
    with heartbeat.left_to(None):
        before = beats.read(1).number
        exchanges()
        assert beats.read(1).number == before
    exchanges()
    heartbeat.beat()
    assert beats.read(1).number == before + 3
