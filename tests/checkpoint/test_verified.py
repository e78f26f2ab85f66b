"""What verifies: complete, undamaged, of its step, of its run, of a format that is known."""

from __future__ import annotations

import json
import shutil
from pathlib import Path

import pytest
from ranks_apart import on_ranks
from tiny_state import RUN, save

from bigtrain.checkpoint import manifest
from bigtrain.checkpoint.verified import fault_of, is_of_other_run, is_verified, verify
from bigtrain.errors import CheckpointError, NewerFormat


def test_what_was_saved_verifies(tmp_path: Path) -> None:
    folder = save(tmp_path, 3)
    verify(folder)
    assert is_verified(folder)
    assert fault_of(folder, recipes=RUN.recipes) is None


def test_a_folder_under_another_step_is_named(tmp_path: Path) -> None:
    folder = save(tmp_path, 3)
    shutil.copytree(folder, tmp_path / "step-00000009")
    with pytest.raises(CheckpointError, match=r"step-00000009/manifest.json: damaged: it is of step 3"):
        verify(tmp_path / "step-00000009")
    shutil.copytree(folder, tmp_path / "best")
    verify(tmp_path / "best")


def test_a_checkpoint_of_another_run_is_named(tmp_path: Path) -> None:
    folder = save(tmp_path, 3)
    assert "of another run" in str(fault_of(folder, recipes={"another recipe"}))
    assert not is_of_other_run({}, {"another recipe"})
    assert not is_of_other_run({"recipe": "x"}, None)


def test_links_are_refused(tmp_path: Path) -> None:
    folder = save(tmp_path / "run", 3)
    folder.rename(tmp_path / "step-00000003")
    folder.symlink_to(tmp_path / "step-00000003")
    assert "a link, which may lead anywhere" in str(fault_of(folder))
    path = tmp_path / "step-00000003" / manifest.MANIFEST
    path.rename(tmp_path / "outside")
    path.symlink_to(tmp_path / "outside")
    assert "not a complete checkpoint" in str(fault_of(path.parent))


def test_a_newer_format_is_no_damage(tmp_path: Path) -> None:
    folder = save(tmp_path, 3)
    path = folder / manifest.MANIFEST
    path.write_text(json.dumps(json.loads(path.read_text()) | {"format_version": 2}))
    for found in on_ranks(2, lambda world: fault_of(folder, world)):
        assert isinstance(found, NewerFormat)
        assert found.exit_code == 2
    with pytest.raises(NewerFormat, match="format 2 is newer than this bigtrain reads, which is 1; update bigtrain"):
        is_verified(folder)


def test_files_that_nobody_asked_for_are_passed_over(tmp_path: Path) -> None:
    folder = save(tmp_path, 3)
    (folder / "notes.txt").write_text("mine")
    verify(folder)


def test_a_disk_that_cannot_read_a_file_is_damage(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    folder = save(tmp_path, 3)

    def unreadable(path: Path) -> None:
        raise OSError(5, "Input/output error")

    monkeypatch.setattr("bigtrain.checkpoint.tensors.digest", unreadable)
    assert "damaged: Input/output error" in str(fault_of(folder))
