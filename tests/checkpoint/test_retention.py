"""What goes from a run folder, and what never does."""

from __future__ import annotations

import shutil
from pathlib import Path

import pytest

from bigtrain.checkpoint import retention
from bigtrain.checkpoint.retention import aside_name, remove, remove_debris, superseded


@pytest.mark.parametrize(
    ("names", "bad", "gone"),
    [
        ("dcba", "", "ba"),
        ("dcba", "c", "a"),
        ("dcba", "dc", ""),
        ("dcba", "dcb", ""),
        ("ba", "", ""),
        ("", "", ""),
    ],
)
def test_only_those_that_verify_stand_for_older_ones(names: str, bad: str, gone: str) -> None:
    assert superseded(list(names), 2, lambda name: name not in bad) == list(gone)


def test_none_is_asked_about_while_there_are_not_too_many() -> None:
    assert superseded(["b", "a"], 2, lambda name: pytest.fail(name)) == []
    asked: list[str] = []
    superseded(["d", "c", "b", "a"], 2, lambda name: asked.append(name) or True)
    assert asked == ["d", "c"]


def test_a_checkpoint_goes_by_its_name_first(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    (tmp_path / "step-00000003").mkdir()
    (tmp_path / "step-00000003" / "file").touch()
    monkeypatch.setattr(shutil, "rmtree", lambda *_, **__: None)
    remove(tmp_path / "step-00000003")
    assert retention._ASIDE.fullmatch(next(tmp_path.iterdir()).name)


def test_what_cannot_be_removed_is_said(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    remove(tmp_path / "step-00000003")
    assert "step-00000003: not removed: No such file" in capsys.readouterr().err


def test_debris_goes_and_nothing_else(tmp_path: Path) -> None:
    kept = {".tmp-mine", "step-00000001", "bad-step-00000001-0", ".tmp-4-0123abcd", ".tmp-5-0123abcd"}
    for name in (aside_name(3), ".tmp-mine", "step-00000001", "bad-step-00000001-0"):
        (tmp_path / name).mkdir()
        (tmp_path / name / "file").touch()
    (tmp_path / ".tmp-4-0123abcd").touch()  # a file, which no save leaves
    (tmp_path / ".tmp-5-0123abcd").symlink_to(tmp_path / "step-00000001")
    remove_debris(tmp_path)
    assert {path.name for path in tmp_path.iterdir()} == kept
    assert (tmp_path / "step-00000001" / "file").exists()
    remove_debris(tmp_path / "absent")
