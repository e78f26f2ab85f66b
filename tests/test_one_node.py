"""A run on this machine alone: what is started again, and what ends it; its processes are a few lines of Python."""

from __future__ import annotations

import os
import signal
import sys
import threading
import time
from pathlib import Path

import pytest

from bigtrain.one_node import keep_running
from bigtrain.spawner import CRASHED, Workers
from bigtrain.stops import Stopped, Stops

ATTEMPT = """
import os, signal, sys, time
from pathlib import Path
folder, rank = Path(sys.argv[1]), int(os.environ.get("RANK", 0))
mine = folder / f"attempts-{rank}"
attempt = len(mine.read_text()) if mine.exists() else 0
mine.write_text("x" * (attempt + 1))
def save(): (folder / f"step-{attempt + 1:08d}").mkdir()
"""


def run(folder: Path, script: str, *, count: int = 1, stops: Stops | None = None) -> int:
    argv = [sys.executable, "-c", ATTEMPT + script, str(folder)]
    return keep_running(lambda: Workers(argv, "", os.environ, count), folder, stops or Stops())


def attempts(folder: Path, rank: int = 0) -> int:
    return len((folder / f"attempts-{rank}").read_text())


def test_one_that_is_killed_is_started_again_with_all_others(tmp_path: Path, capfd: pytest.CaptureFixture[str]) -> None:
    script = "if rank and attempt < 2: os.kill(os.getpid(), 9)\ntime.sleep(60 if attempt < 2 else 0)"
    assert run(tmp_path, script, count=2) == 0
    assert attempts(tmp_path, 0) == attempts(tmp_path, 1) == 3
    said = capfd.readouterr().out
    assert "the training process of rank 1 on " in said
    assert "was ended by SIGKILL; starting again from the start (2 of 3)" in said


def test_a_crash_loop_ends(tmp_path: Path, capfd: pytest.CaptureFixture[str]) -> None:
    assert run(tmp_path, "os.kill(os.getpid(), signal.SIGSEGV)") == 1
    assert attempts(tmp_path) == 4
    said = capfd.readouterr().err
    assert "error: the training process was ended by SIGSEGV; 3 restarts brought no new checkpoint" in said


@pytest.mark.parametrize("code", [0, 1, 2, 3, 75, 76])
def test_who_says_how_it_ended_is_not_started_again(tmp_path: Path, code: int) -> None:
    assert run(tmp_path, f"sys.exit({code})") == code
    assert attempts(tmp_path) == 1


def test_a_crash_is_tried_again_only_after_a_new_checkpoint(tmp_path: Path) -> None:
    assert run(tmp_path, f"save() if attempt < 2 else None; sys.exit({CRASHED})") == 1
    assert attempts(tmp_path) == 3


def test_one_that_was_told_to_stop_before_it_listened_ends_the_run(tmp_path: Path) -> None:
    with pytest.raises(Stopped, match="SIGTERM"):
        run(tmp_path, "os.kill(os.getpid(), signal.SIGTERM)")
    assert attempts(tmp_path) == 1


@pytest.mark.parametrize(("does", "code"), [("sys.exit(75)", 75), ("os.kill(os.getpid(), 9)", None)])
def test_signals_are_passed_on_and_nothing_is_started_after_one(tmp_path: Path, does: str, code: int | None) -> None:
    stops = Stops()

    def ask() -> None:
        while not (tmp_path / "listens").exists():
            time.sleep(0.01)
        stops.asked.append(signal.SIGUSR1)

    def listening() -> int:
        script = f"signal.signal(signal.SIGUSR1, lambda *_: {does}); (folder / 'listens').touch(); time.sleep(60)"
        return run(tmp_path, script, stops=stops)

    thread = threading.Thread(target=ask)
    thread.start()
    if code is None:
        with pytest.raises(Stopped, match="SIGUSR1"):
            listening()
    else:
        assert listening() == code
    thread.join()
    assert attempts(tmp_path) == 1


def test_asked_before_the_first_start_there_is_none(tmp_path: Path) -> None:
    stops = Stops()
    stops.asked.append(signal.SIGINT)
    with pytest.raises(Stopped, match="SIGINT"):
        run(tmp_path, "", stops=stops)
    assert not (tmp_path / "attempts-0").exists()
