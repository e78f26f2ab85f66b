"""The store: complete or absent, verified or passed over, never written over."""

from __future__ import annotations

import os
from pathlib import Path

import pytest
import torch

from bigtrain.checkpoint import manifest, tensors
from bigtrain.checkpoint.store import CheckpointStore, find_checkpoint, is_verified, only_user_of, verify
from bigtrain.errors import CheckpointError, ResumeError


def save(store: CheckpointStore, step: int) -> Path:
    return store.save(step, {"weights.safetensors": {"w": torch.full((50,), float(step))}}, {"state.json": "{}"})


def test_the_newest_is_found(tmp_path: Path) -> None:
    store = CheckpointStore(tmp_path)
    assert store.newest() is None
    save(store, 5)
    save(store, 10)
    assert store.newest() == tmp_path / "step-00000010"
    assert sorted(f.name for f in store.newest().iterdir()) == ["manifest.json", "state.json", "weights.safetensors"]


@pytest.mark.parametrize("victim", ["weights.safetensors", "state.json", "manifest.json"])
@pytest.mark.parametrize("damage", ["flip", "cut", "delete", "swap"])
def test_damage_is_named_and_passed_over(
    tmp_path: Path, victim: str, damage: str, capsys: pytest.CaptureFixture[str]
) -> None:
    store = CheckpointStore(tmp_path)
    older, newer = save(store, 5), save(store, 10)
    path = newer / victim
    raw = bytearray(path.read_bytes())
    if damage == "flip":
        raw[len(raw) // 2] ^= 4
        path.write_bytes(raw)
    elif damage == "cut":
        path.write_bytes(raw[:-1])
    elif damage == "delete":
        path.unlink()
    else:
        path.write_bytes((older / victim).read_bytes() + (b"x" if victim == "state.json" else b""))
    if damage == "swap" and victim == "manifest.json":
        assert not is_verified(newer)
    assert store.newest() == older
    assert "step-00000010" in capsys.readouterr().err


def test_none_verifies(tmp_path: Path) -> None:
    store = CheckpointStore(tmp_path)
    (save(store, 5) / "state.json").unlink()
    with pytest.raises(CheckpointError, match="none of its 1 checkpoints verifies"):
        store.newest()


def test_a_link_is_no_file_of_a_checkpoint(tmp_path: Path) -> None:
    folder = save(CheckpointStore(tmp_path), 5)
    outside = tmp_path / "outside"
    (folder / "state.json").rename(outside)
    (folder / "state.json").symlink_to(outside)
    with pytest.raises(CheckpointError, match="missing"):
        verify(folder)


def test_a_verified_step_is_kept_a_damaged_one_moved_aside(tmp_path: Path) -> None:
    store = CheckpointStore(tmp_path)
    folder = save(store, 5)
    before = (folder / manifest.MANIFEST).stat().st_mtime_ns
    save(store, 5)
    assert (folder / manifest.MANIFEST).stat().st_mtime_ns == before
    (folder / "state.json").write_text("{1}")
    save(store, 5)
    verify(folder)
    assert (tmp_path / "bad-step-00000005-0" / "state.json").read_text() == "{1}"


def test_only_the_newest_are_kept_and_debris_goes(tmp_path: Path) -> None:
    store = CheckpointStore(tmp_path, keep=2)
    (tmp_path / ".tmp-3-0123dead").mkdir()
    (tmp_path / ".tmp-mine").mkdir()
    for step in (1, 2, 3, 4):
        save(store, step)
    assert sorted(folder.name for folder in tmp_path.iterdir()) == [".tmp-mine", "step-00000003", "step-00000004"]


def test_incomplete_folders_do_not_count_as_kept(tmp_path: Path) -> None:
    store = CheckpointStore(tmp_path, keep=2)
    for step in (1, 2):
        save(store, step)
    (tmp_path / "step-00000099").mkdir()
    save(store, 3)
    assert [manifest.step_of(f) for f in manifest.step_folders(tmp_path)] == [99, 3, 2]


def test_a_failed_save_leaves_the_previous_one_and_no_debris(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    store = CheckpointStore(tmp_path)
    save(store, 1)

    def full_disk(path: Path, data: bytes) -> tensors.Digest:
        raise OSError(28, "No space left on device", str(path))

    monkeypatch.setattr(tensors, "write_bytes", full_disk)
    with pytest.raises(OSError, match="No space left"):
        save(store, 2)
    assert [folder.name for folder in tmp_path.iterdir()] == ["step-00000001"]
    assert store.newest() == tmp_path / "step-00000001"


def test_find_checkpoint_takes_a_run_or_a_checkpoint(tmp_path: Path) -> None:
    folder = save(CheckpointStore(tmp_path / "run"), 5)
    assert find_checkpoint(tmp_path / "run") == folder
    assert find_checkpoint(folder) == folder
    for nothing in (tmp_path / "absent", tmp_path):
        with pytest.raises(CheckpointError, match="holds no checkpoint"):
            find_checkpoint(nothing)


def test_later_checkpoints_that_are_damaged_do_not_push_out_the_new_one(tmp_path: Path) -> None:
    store = CheckpointStore(tmp_path, keep=2)
    for step in (5, 10, 12):
        save(CheckpointStore(tmp_path, keep=9), step)
    for step in (10, 12):
        (tmp_path / manifest.folder_name(step) / "state.json").write_text("damaged")
    save(store, 6)
    assert store.newest() == tmp_path / "step-00000006"
    assert (tmp_path / "step-00000005").is_dir()


def test_a_folder_has_one_user_at_a_time(tmp_path: Path) -> None:
    refused = pytest.raises(ResumeError, match=rf"in use by process {os.getpid()} on ")
    with only_user_of(tmp_path), refused, only_user_of(tmp_path):
        pass
    with only_user_of(tmp_path):
        pass
