"""Faults that tests ask for: read from the environment, at a point, a rank, a step, once."""

from __future__ import annotations

import subprocess
import sys
from pathlib import Path

import pytest

from bigtrain import fault_points
from bigtrain.fault_points import ACTIONS, POINTS, parse, reached

REACH = "from bigtrain.fault_points import reached; print(reached('data', 3)); print('lived')"


def asked(monkeypatch: pytest.MonkeyPatch, text: str, rank: int = 0) -> None:
    monkeypatch.setattr(fault_points, "_ASKED", parse(text))
    monkeypatch.setenv("RANK", str(rank))


def ended(text: str) -> subprocess.CompletedProcess[str]:
    environment = {"BIGTRAIN_FAULTS": text, "PYTHONPATH": ":".join(sys.path)}
    return subprocess.run([sys.executable, "-c", REACH], capture_output=True, text=True, env=environment, check=False)


def test_nothing_happens_unless_asked_for() -> None:
    assert not fault_points._ASKED
    assert all(reached(point, step) is None for point in POINTS for step in range(3))


@pytest.mark.parametrize(
    ("text", "lives"),
    [("", True), ("data:kill", False), ("data:kill:step=3", False), ("data:kill:step=4", True), ("save:kill", True),
     ("data:kill:rank=1", True), ("data:kill:rank=0", False), ("data:slow=0.01", True)],
)  # fmt: skip
def test_a_kill_is_sudden(text: str, *, lives: bool) -> None:
    found = ended(text)
    assert ("lived" in found.stdout) == lives
    assert found.returncode == (0 if lives else -9)


def test_raise_says_where(monkeypatch: pytest.MonkeyPatch) -> None:
    asked(monkeypatch, "update:raise:rank=2", rank=2)
    with pytest.raises(RuntimeError, match="fault at update"):
        reached("update", 1)


def test_a_change_is_the_callers(monkeypatch: pytest.MonkeyPatch) -> None:
    asked(monkeypatch, "loss:change=2.5:step=4 gradient:change")
    assert [reached("loss", step) for step in (3, 4, 5)] == [None, 2.5, None]
    assert reached("gradient", 9) == 1.0


def test_once_is_once_whoever_comes_first(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    asked(monkeypatch, f"loss:change:once={tmp_path / 'done'}")
    assert [reached("loss", step) for step in range(3)] == [1.0, None, None]
    assert (tmp_path / "done").is_file()


@pytest.mark.parametrize("text", ["nowhere:kill", "data:melt", "data:kill:host=3", "data", "data:kill:rank=x"])
def test_what_there_is_not_is_refused(text: str) -> None:
    with pytest.raises(ValueError, match=r"BIGTRAIN_FAULTS|unpack|invalid literal"):
        parse(text)


@pytest.mark.parametrize("action", ACTIONS)
@pytest.mark.parametrize("point", POINTS)
def test_each_can_be_asked_for(point: str, action: str) -> None:
    (found,) = parse(f"{point}:{action}:rank=1:step=2")
    assert (found.point, found.action, found.rank, found.step) == (point, action, 1, 2)
