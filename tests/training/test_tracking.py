"""Trackers get every row, whatever they do, and no training waits for them."""

from __future__ import annotations

import subprocess
import sys
import threading
import time
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import pytest

from bigtrain.training import tracking
from bigtrain.training.dashboard import Story
from bigtrain.training.metrics import MetricsLog, read_metrics
from bigtrain.training.tracking import Trackers, numbers


class Remembers:
    """A tracker that fails where it is told to."""

    def __init__(self, *, fails_at: frozenset[int] = frozenset(), gate: threading.Event | None = None) -> None:
        self.rows: list[tuple[int, Mapping[str, Any]]] = []
        self.ended = False
        self._fails_at, self._gate = fails_at, gate

    def log(self, values: Mapping[str, Any], step: int) -> None:
        if self._gate is not None:
            self._gate.wait(60)
        if step in self._fails_at:
            raise ConnectionError(f"no answer at step {step}\nand more")
        self.rows.append((step, values))

    def finish(self) -> None:
        self.ended = True


def open_as(monkeypatch: pytest.MonkeyPatch, opened: dict[str, Any]) -> None:
    def start(name: str, _story: Story) -> Any:
        if isinstance(opened[name], BaseException):
            raise opened[name]
        return opened[name]

    monkeypatch.setattr(tracking, "open_dashboard", start)


def trackers(folder: Path, *names: str) -> Trackers:
    return Trackers(names, Story("p", "r", folder, {}))


def test_each_gets_the_numbers_of_every_row(
    monkeypatch: pytest.MonkeyPatch, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    one, other = Remembers(), Remembers()
    open_as(monkeypatch, {"wandb": one, "mlflow": other})
    log = MetricsLog(
        tmp_path, step=0, trackers=[], others=trackers(tmp_path, "tensorboard", "wandb", "mlflow", "wandb")
    )
    for step in (1, 2, 3):
        log.write({"step": step, "loss": 0.5 * step, "event": "a spike", "peak": None})
    log.close()
    assert one.rows == other.rows == [(step, {"loss": 0.5 * step}) for step in (1, 2, 3)]
    assert one.ended and other.ended
    assert len(read_metrics(tmp_path)) == 3
    assert capsys.readouterr() == ("", "")


def test_one_that_fails_is_told_once_and_tried_again(
    monkeypatch: pytest.MonkeyPatch, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    flaky = Remembers(fails_at=frozenset({2, 4}))
    open_as(monkeypatch, {"wandb": flaky, "mlflow": RuntimeError("not logged in"), "aim": SystemExit()})
    told = trackers(tmp_path, "wandb", "mlflow", "aim")
    for step in range(1, 6):
        told.write({"step": step, "loss": 1.0})
    told.close()
    assert [step for step, _ in flaky.rows] == [1, 3, 5]
    assert sorted(capsys.readouterr().err.splitlines()) == [
        "warning: aim: SystemExit; the run goes on without it",
        "warning: mlflow: not logged in; the run goes on without it",
        "warning: wandb: no answer at step 2; rows may be lost to it",
    ]


def test_nobody_waits_for_one_that_hangs(
    monkeypatch: pytest.MonkeyPatch, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    gate = threading.Event()
    monkeypatch.setattr(tracking, "MOST_WAITING", 3)
    open_as(monkeypatch, {"wandb": Remembers(gate=gate)})
    monkeypatch.setattr(tracking, "CLOSE_SECONDS", 0.05)
    told = trackers(tmp_path, "wandb")
    begun = time.monotonic()
    for step in range(1, 20):
        told.write({"step": step, "loss": 1.0})
    told.close()
    assert time.monotonic() - begun < 30
    (line,) = capsys.readouterr().err.splitlines()
    assert line.startswith("warning: wandb: takes rows too slowly; those from step ")
    gate.set()


LEFT = """
import atexit, sys, threading, time
from pathlib import Path
import bigtrain.training.__main__ as process
from bigtrain.training import tracking
from bigtrain.training.dashboard import Story
def opened(name, story):
    atexit.register(time.sleep, 300)
    started.set()
    time.sleep(300)
tracking.open_dashboard, tracking.CLOSE_SECONDS, started = opened, 0.05, threading.Event()
assert not tracking.are_left_behind()
told = tracking.Trackers(["wandb"], Story("p", "r", Path(), {}))
assert started.wait(60)
told.close()
print("finished")
process._end(75)
"""


def test_a_library_that_waits_at_the_end_of_the_process_holds_up_no_finished_run() -> None:
    found = subprocess.run([sys.executable, "-c", LEFT], capture_output=True, text=True, check=False, timeout=200)
    assert (found.returncode, found.stdout) == (75, "finished\n")
    assert found.stderr == "warning: wandb: did not end in time; 0 rows may be lost to it\n"


def test_going_back_cuts_the_file_and_keeps_the_trackers(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    one = Remembers()
    open_as(monkeypatch, {"wandb": one})
    log = MetricsLog(tmp_path, step=0, trackers=["tensorboard"], others=trackers(tmp_path, "wandb"))
    for step in (1, 2, 3):
        log.write({"step": step, "loss": 1.0})
    log.go_back(1)
    log.write({"step": 2, "loss": 2.0})
    log.close()
    assert [(row["step"], row["loss"]) for row in read_metrics(tmp_path)] == [(1, 1.0), (2, 2.0)]
    assert [step for step, _ in one.rows] == [1, 2, 3, 2]
    assert one.ended


def test_only_numbers_are_drawn() -> None:
    assert numbers({"step": 3, "loss": 1.5, "skipped": 0, "peak": None, "event": "x"}) == {"loss": 1.5, "skipped": 0}
