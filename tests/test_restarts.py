"""Which faults are tried again: three without a new checkpoint, and only some of those that a process says itself."""

from __future__ import annotations

import os
import signal
from pathlib import Path

import pytest

from bigtrain.errors import BigtrainError, Interrupted
from bigtrain.restarts import FINAL, RESTARTS, Restarts, newest_step, stoppable


def save(folder: Path, step: int) -> None:
    (folder / f"step-{step:08d}").mkdir(parents=True)


def test_three_are_tried_again_without_a_new_checkpoint(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    restarts = Restarts(tmp_path / "not-there-yet")
    assert [restarts.again("it broke; a hint") for _ in range(RESTARTS + 1)] == [True, True, True, False]
    said = capsys.readouterr()
    assert said.out.splitlines()[0] == "it broke; starting again from the start (1 of 3)"
    assert said.err == "error: it broke; a hint; 3 restarts brought no new checkpoint\n"


def test_a_new_checkpoint_starts_the_count_anew(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    restarts = Restarts(tmp_path)
    for step in range(1, 20):
        save(tmp_path, step)
        assert restarts.again("it broke")
        assert restarts.again("it broke")
    assert "starting again from step 19 (2 of 3)" in capsys.readouterr().out


def test_what_is_computed_again_must_have_come_further(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    save(tmp_path, 4)
    restarts = Restarts(tmp_path)
    assert not restarts.again("it crashed", hopeful=False)
    assert capsys.readouterr().err == "error: it crashed before a new checkpoint; not tried again\n"
    save(tmp_path, 5)
    assert restarts.again("it crashed", hopeful=False)
    assert not restarts.again("it crashed", hopeful=False)


def test_what_a_process_says_itself_is_final() -> None:
    assert FINAL == (0, 1, 2, 3, 75)


def test_the_newest_step_is_that_of_the_last_folder(tmp_path: Path) -> None:
    assert newest_step(tmp_path / "absent") == 0
    save(tmp_path, 3)
    save(tmp_path, 12)
    assert newest_step(tmp_path) == 12


def test_a_signal_that_nobody_could_save_for_tells_what_there_is(tmp_path: Path) -> None:
    text = "^SIGUSR1: ended before a checkpoint; launch again to start$"
    with pytest.raises(BigtrainError, match=text) as ended, stoppable(tmp_path):
        os.kill(os.getpid(), signal.SIGUSR1)
        signal.pause()
    assert ended.value.exit_code == 1
    save(tmp_path, 7)
    text = "^SIGTERM: the newest checkpoint is of step 7; launch again to go on"
    with pytest.raises(Interrupted, match=text), stoppable(tmp_path) as stops:
        stops.waiting = False
        signal.raise_signal(signal.SIGTERM)
        stops.check()
