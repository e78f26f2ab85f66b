"""Where a profile goes: the terminal, JSON, a page, a picture; and files that cannot be written."""

from __future__ import annotations

import importlib.util
import json
from pathlib import Path
from typing import Any

import pytest

from bigtrain.errors import InputError
from bigtrain.memory.record import Recording
from bigtrain.memory.report import MemoryReport
from bigtrain.profiling.output import check_writable, present, profiled
from bigtrain.profiling.result import Predicted, Profile
from bigtrain.profiling.steps import Measured


@pytest.fixture
def profile() -> Profile:
    recording = Recording()
    recording.mark("step 1")
    recording.phase = "forward"
    recording.release(recording.allocate(2**20, "weights", "blocks.0"))
    memory = MemoryReport({"weights": 2**20})
    return Profile(
        "tiny", "a CPU", Predicted(memory, recording, "step 1", 0.5), Measured(memory, recording, "step 1", 1)
    )


def test_a_profile_is_of_memory_or_of_time(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("bigtrain.profiling.recipe.profile_recipe", lambda plan: (plan, "memory"))
    monkeypatch.setattr("bigtrain.profiling.step_time.time_recipe", lambda plan: (plan, "time"))
    plan: Any = object()
    assert profiled(plan, of_time=False) == (plan, "memory")
    assert profiled(plan, of_time=True) == (plan, "time")


def test_a_table(profile: Profile, capsys: pytest.CaptureFixture[str]) -> None:
    present(profile)
    assert capsys.readouterr().out == "\n".join(profile.lines()) + "\n"


def test_one_json_object(profile: Profile, capsys: pytest.CaptureFixture[str]) -> None:
    present(profile, as_json=True)
    assert json.loads(capsys.readouterr().out) == profile.as_object()


def test_a_page(profile: Profile, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    present(profile, html=tmp_path / "p.html")
    text = (tmp_path / "p.html").read_text(encoding="utf-8")
    assert "tiny" in text
    assert "<svg" in text
    assert "tiny on a CPU" in capsys.readouterr().out


@pytest.mark.skipif(importlib.util.find_spec("matplotlib") is None, reason="no matplotlib")
def test_a_picture(profile: Profile, tmp_path: Path) -> None:
    present(profile, png=tmp_path / "p.png")
    assert (tmp_path / "p.png").read_bytes().startswith(b"\x89PNG")


@pytest.mark.parametrize("kind", ["html", "png"])
def test_a_file_that_cannot_be_written(
    profile: Profile, tmp_path: Path, capsys: pytest.CaptureFixture[str], kind: str
) -> None:
    with pytest.raises(InputError, match="p: No such file or directory; name another file"):
        present(profile, **{kind: tmp_path / "absent" / "p"})
    assert "tiny on a CPU" in capsys.readouterr().out


def test_files_that_cannot_be_written_are_told_before_anything_is_measured(tmp_path: Path) -> None:
    check_writable(None, tmp_path / "new.html", None)
    with pytest.raises(InputError, match=r"command line: .*x.html: .*gone is no folder that can be"):
        check_writable(None, tmp_path / "gone" / "x.html")
    with pytest.raises(InputError, match=r"is a folder; name another file"):
        check_writable(tmp_path)
