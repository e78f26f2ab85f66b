"""The store: complete or absent, verified or passed over, never written over."""

from __future__ import annotations

import errno
import platform
import shutil
import threading
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from ranks_apart import on_ranks, succeeded

from bigtrain.checkpoint import manifest, store, tensors, verified
from bigtrain.checkpoint.lineage import Identity
from bigtrain.checkpoint.store import CheckpointStore, find_checkpoint
from bigtrain.checkpoint.verified import is_verified, verify
from bigtrain.errors import CheckpointError, NewerFormat
from bigtrain.sharding.part import Part
from bigtrain.world import World


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


RANKS = 3


def save_together(folder: Path, step: int, size: int = RANKS) -> list[Any]:
    """Save on ranks, the last of which writes nothing: it has the same as the first."""

    def work(world: World) -> Path:
        name = f"weights-{world.rank:05d}-of-{size - 1:05d}.safetensors"
        part = Part((2 * size - 2,), (2 * world.rank,), (2,))
        own = {name: {"w": torch.full((2,), float(step + world.rank))}} if world.rank < size - 1 else {}
        texts = {"state.json": str(step)}
        return CheckpointStore(folder, keep=2, world=world).save(step, own, texts, {name: {"w": part}})

    return on_ranks(size, work)


def newest_together(folder: Path, size: int = RANKS) -> list[Any]:
    return on_ranks(size, lambda world: CheckpointStore(folder, world=world).newest())


def test_ranks_publish_one_checkpoint(tmp_path: Path) -> None:
    folder = tmp_path / "step-00000005"
    assert save_together(tmp_path, 5) == [folder] * RANKS
    names = ["manifest.json", "state.json", "weights-00000-of-00002.safetensors", "weights-00001-of-00002.safetensors"]
    assert sorted(file.name for file in folder.iterdir()) == names
    assert set(manifest.read(folder)["files"]) == set(names[1:])
    verify(folder)
    assert newest_together(tmp_path) == [folder] * RANKS
    assert newest_together(tmp_path, 5) == [folder] * 5
    assert CheckpointStore(tmp_path).newest() == folder


def test_ranks_keep_the_newest_and_write_over_none(tmp_path: Path) -> None:
    for step in (1, 2, 3):
        succeeded(save_together(tmp_path, step))
    before = (tmp_path / "step-00000003" / manifest.MANIFEST).stat().st_mtime_ns
    succeeded(save_together(tmp_path, 3))
    assert sorted(file.name for file in tmp_path.iterdir()) == ["step-00000002", "step-00000003"]
    assert (tmp_path / "step-00000003" / manifest.MANIFEST).stat().st_mtime_ns == before
    (tmp_path / "step-00000003" / "state.json").write_text("damaged")
    succeeded(save_together(tmp_path, 3))
    assert (tmp_path / "bad-step-00000003-0").is_dir()
    verify(tmp_path / "step-00000003")


@pytest.mark.parametrize("victim", ["weights-00000-of-00002.safetensors", "weights-00001-of-00002.safetensors"])
@pytest.mark.parametrize("size", [1, 2, 3])
def test_damage_in_any_file_is_found_by_any_ranks(
    tmp_path: Path, victim: str, size: int, capsys: pytest.CaptureFixture[str]
) -> None:
    for step in (5, 10):
        succeeded(save_together(tmp_path, step))
    path = tmp_path / "step-00000010" / victim
    raw = bytearray(path.read_bytes())
    raw[-1] ^= 1
    path.write_bytes(raw)
    assert newest_together(tmp_path, size) == [tmp_path / "step-00000005"] * size
    told = capsys.readouterr().err
    assert told.count("passed over") == 1
    assert victim in told
    found = on_ranks(size, lambda world: find_checkpoint(path.parent, world))
    assert all(isinstance(error, CheckpointError) and victim in str(error) for error in found)


def test_a_file_of_each_rank_swapped_is_found(tmp_path: Path) -> None:
    succeeded(save_together(tmp_path, 5))
    one, other = sorted((tmp_path / "step-00000005").glob("weights-*"))
    kept = one.read_bytes()
    one.write_bytes(other.read_bytes())
    other.write_bytes(kept)
    assert all(isinstance(error, CheckpointError) for error in newest_together(tmp_path))


OPERATIONS: dict[str, tuple[Any, str]] = {
    "make the folder": (Path, "mkdir"),
    "write": (tensors.DigestingFile, "write"),
    "sync a file": (tensors.DigestingFile, "close"),
    "sync a folder": (store, "sync_folder"),
    "write the manifest": (manifest, "encode"),
    "move a bad one aside": (store, "_move_aside"),
    "publish": (Path, "rename"),
}


def failing_at(real: Callable[..., Any], at: int, seen: list[int]) -> Callable[..., Any]:
    """Return a function that fails when it is called for the so manyth time."""

    def operation(*arguments: Any, **options: Any) -> Any:
        seen.append(1)
        if len(seen) == at + 1:
            raise OSError(errno.ENOSPC, "No space left on device", "the disk")
        return real(*arguments, **options)

    return operation


@pytest.mark.parametrize("operation", OPERATIONS)
def test_a_disk_that_is_full_at_any_moment_leaves_the_last_one_and_hangs_no_rank(
    tmp_path: Path, operation: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    owner, name = OPERATIONS[operation]
    succeeded(save_together(tmp_path, 1))
    failures, at = 0, 0
    while True:
        seen: list[int] = []
        with monkeypatch.context() as patch:
            patch.setattr(owner, name, failing_at(getattr(owner, name), at, seen))
            outcomes = save_together(tmp_path, 2)
        if len(seen) <= at:  # it was not called so often
            break
        failures, at = failures + 1, at + 1
        assert all(isinstance(error, OSError) and error.errno == errno.ENOSPC for error in outcomes)
        published = (tmp_path / "step-00000002").is_dir()
        assert published == (operation == "sync a folder" and at > RANKS + 1)
        expected = tmp_path / f"step-0000000{2 if published else 1}"
        assert CheckpointStore(tmp_path).newest() == expected
        assert not list(tmp_path.glob(".tmp-*"))
        if published:
            shutil.rmtree(tmp_path / "step-00000002")
    assert failures
    assert outcomes == [tmp_path / "step-00000002"] * RANKS
    assert newest_together(tmp_path) == outcomes


def test_a_folder_that_one_rank_does_not_see(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    real = verified.check_seen
    succeeded(save_together(tmp_path, 1))

    def elsewhere(folder: Path) -> None:
        if threading.current_thread() is not threading.main_thread() and blind.pop():
            folder = folder / "elsewhere"
        real(folder)

    for work in (lambda: save_together(tmp_path, 2), lambda: newest_together(tmp_path)):
        blind = [False, True, False]
        for module in (store, verified):
            monkeypatch.setattr(module, "check_seen", elsewhere)
        outcomes = work()
        assert all(isinstance(error, CheckpointError) for error in outcomes)
        assert all("must be on a file system that all nodes share" in str(error) for error in outcomes)
        assert all(platform.node() in str(error) for error in outcomes)
    monkeypatch.undo()
    assert newest_together(tmp_path) == [tmp_path / "step-00000001"] * RANKS


def test_ranks_find_a_run_a_checkpoint_or_neither(tmp_path: Path) -> None:
    succeeded(save_together(tmp_path / "run", 5))
    for path in (tmp_path / "run", tmp_path / "run" / "step-00000005"):
        found = on_ranks(2, lambda world, path=path: find_checkpoint(path, world))
        assert found == [tmp_path / "run" / "step-00000005"] * 2
    nothing = on_ranks(2, lambda world: find_checkpoint(tmp_path / "absent", world))
    assert all("holds no checkpoint" in str(error) for error in nothing)
    assert newest_together(tmp_path / "absent") == [None] * RANKS


def test_one_is_too_few_to_keep(tmp_path: Path) -> None:
    with pytest.raises(ValueError, match="keep=1: use 2 or more"):
        CheckpointStore(tmp_path, keep=1)


def test_a_manifest_says_which_run_it_is_of(tmp_path: Path) -> None:
    mine, other = Identity("a", "data", frozenset("ab")), Identity("c", "data", frozenset("c"))
    folder = save(CheckpointStore(tmp_path, identity=mine), 5)
    found = manifest.read(folder)
    assert (found["recipe"], found["data"], found["world_size"], found["step"]) == ("a", "data", 1, 5)
    assert CheckpointStore(tmp_path, identity=mine._replace(recipe="b")).newest() == folder
    with pytest.raises(CheckpointError, match="none of its 1"):
        CheckpointStore(tmp_path, identity=other).newest()
    assert save(CheckpointStore(tmp_path, identity=other), 5) == folder
    assert manifest.read(folder)["recipe"] == "c"
    assert manifest.read(tmp_path / "bad-step-00000005-0")["recipe"] == "a"


def test_a_newer_format_is_never_passed_over(tmp_path: Path) -> None:
    store = CheckpointStore(tmp_path)
    save(store, 5)
    path = save(store, 10) / manifest.MANIFEST
    path.write_text(path.read_text().replace('"format_version": 1', '"format_version": 2'))
    with pytest.raises(NewerFormat):
        store.newest()


def test_damaged_ones_stand_for_none_that_are_older(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    for step in (1, 2, 3):
        save(CheckpointStore(tmp_path, keep=9), step)
    (tmp_path / "step-00000003" / "state.json").write_text("damaged")
    store = CheckpointStore(tmp_path, keep=2)
    save(store, 4)
    assert [manifest.step_of(folder) for folder in manifest.step_folders(tmp_path)] == [4, 3, 2]
    save(store, 5)
    assert [manifest.step_of(folder) for folder in manifest.step_folders(tmp_path)] == [5, 4]
    assert capsys.readouterr().err.count("does not count as kept: ") == 1


def test_others_are_not_removed(tmp_path: Path) -> None:
    save(CheckpointStore(tmp_path, identity=Identity("other", "data", frozenset(["other"]))), 1)
    store = CheckpointStore(tmp_path, keep=2, identity=Identity("mine", "data", frozenset(["mine"])))
    for step in (2, 3, 4):
        save(store, step)
    assert [manifest.step_of(folder) for folder in manifest.step_folders(tmp_path)] == [4, 3, 1]


def test_whatever_stands_in_the_way_is_moved(tmp_path: Path) -> None:
    (tmp_path / "step-00000005").symlink_to(tmp_path / "nowhere")
    verify(save(CheckpointStore(tmp_path), 5))
    assert (tmp_path / "bad-step-00000005-0").is_symlink()
    (tmp_path / "step-00000006").write_text("a file")
    verify(save(CheckpointStore(tmp_path), 6))


def test_an_error_while_removing_old_ones_is_no_failed_save(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    def failing(*_: Any) -> None:
        raise OSError(errno.EIO, "Input/output error", "a folder")

    monkeypatch.setattr(CheckpointStore, "_own", failing)
    assert is_verified(save(CheckpointStore(tmp_path), 5))
    assert "older checkpoints are not removed" in capsys.readouterr().err


@pytest.mark.parametrize("change", ["cut", "delete"])
def test_one_that_has_changed_since_it_was_published_stands_for_none(tmp_path: Path, change: str) -> None:
    store = CheckpointStore(tmp_path, keep=2)
    folders = [save(store, step) for step in (1, 2, 3)]
    victim = folders[2] / "weights.safetensors"
    victim.unlink() if change == "delete" else victim.write_bytes(victim.read_bytes()[:-1])
    save(store, 4)
    assert folders[1].is_dir()
    assert is_verified(folders[1])


def test_those_set_aside_are_known_no_more_by_either_world(tmp_path: Path) -> None:
    store = CheckpointStore(tmp_path)
    for step in (1, 2, 3):
        save(store, step)
    other = store.over(World())
    store.set_aside_after(1)
    assert set(other._found) == {"step-00000001"}
    assert store.newest() == other.newest() == tmp_path / "step-00000001"
    assert sorted(path.name for path in tmp_path.glob("bad-*")) == ["bad-step-00000002-0", "bad-step-00000003-0"]
