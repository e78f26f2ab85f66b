"""The saves of a run: at once or in the background, never two at a time, whatever the disk refuses."""

from __future__ import annotations

import errno
import threading
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import rank_copying
import save_memory
from disk import RefuseAt, watched
from group import run_group, told_by_all
from ranks_apart import Meeting, ThreadWorld, on_ranks, succeeded
from tiny_state import TEXTS, holds, saver_in, state_after, store_in

from bigtrain.checkpoint import manifest
from bigtrain.checkpoint.manifest import step_folders
from bigtrain.checkpoint.saver import Saver
from bigtrain.checkpoint.store import CheckpointStore
from bigtrain.errors import BigtrainError, CheckpointError, InputError
from bigtrain.world import World

BOTH = pytest.mark.parametrize("copies", [False, True])


class Held:
    """Keeps a save from ending until it is let go."""

    def __init__(self, monkeypatch: pytest.MonkeyPatch) -> None:
        self.go, self.under_way, self.most = threading.Event(), 0, 0
        plain = CheckpointStore.save

        def save(store: CheckpointStore, *arguments: Any) -> Path:
            self.under_way += 1
            self.most = max(self.most, self.under_way)
            assert self.go.wait(30)
            found = plain(store, *arguments)
            self.under_way -= 1
            return found

        monkeypatch.setattr(CheckpointStore, "save", save)


@BOTH
def test_what_is_saved_is_the_state_at_that_time(tmp_path: Path, copies: bool) -> None:
    saver, state = saver_in(tmp_path, copies=copies), state_after(3)
    folder = state.save(saver, TEXTS)
    assert saver.has(3)
    assert not saver.has(4)
    for parameter in state.engine.parameters.values():
        parameter.data.zero_()
    assert saver.require(3) == folder
    assert holds(folder, state_after(3))
    assert saver.last_good() == f"the last good checkpoint is {folder}"


def test_training_goes_on_meanwhile_and_two_are_never_under_way(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    held, saver = Held(monkeypatch), saver_in(tmp_path, copies=True)
    state_after(3).save(saver, TEXTS)
    assert saver.has(3)
    assert not step_folders(tmp_path)
    later = threading.Thread(target=lambda: state_after(4).save(saver, TEXTS))
    later.start()
    later.join(0.1)
    assert later.is_alive()
    held.go.set()
    later.join(30)
    saver.finish()
    assert [folder.name for folder in step_folders(tmp_path)] == ["step-00000004", "step-00000003"]
    assert held.most == 1


def test_whoever_looks_for_the_newest_waits(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    held, store = Held(monkeypatch), store_in(tmp_path)
    saver = Saver(store, World(), copies=True)
    folder = state_after(3).save(saver, TEXTS)
    threading.Timer(0.1, held.go.set).start()
    assert store.newest() == folder


@BOTH
def test_what_the_disk_refuses_is_told_and_tried_again(
    tmp_path: Path, copies: bool, capsys: pytest.CaptureFixture[str]
) -> None:
    saver = saver_in(tmp_path, copies=copies)
    state_after(3).save(saver, TEXTS)
    saver.finish()
    with watched(tmp_path, RefuseAt(5, errno.EDQUOT)):
        state_after(4).save(saver, TEXTS)
        saver.finish()
    (line,) = capsys.readouterr().err.splitlines()
    assert line.startswith("warning: step 4 is not saved: ")
    assert f"{tmp_path}/.tmp-4-" in line
    assert "; it needs " in line
    assert line.endswith("; step-00000003 is the newest; the next save tries again")
    with pytest.raises(BigtrainError, match=r"^step 4 could not be saved: .*: .*quota.*step-00000003$") as caught:
        saver.require(4)
    assert (caught.value.exit_code, type(caught.value)) == (1, BigtrainError)
    state_after(4).save(saver, TEXTS)
    assert holds(saver.require(4), state_after(4))


@BOTH
def test_what_else_goes_wrong_is_raised(tmp_path: Path, copies: bool, monkeypatch: pytest.MonkeyPatch) -> None:
    def failing(*_: Any) -> None:
        raise CheckpointError("not there on node7")

    monkeypatch.setattr(CheckpointStore, "save", failing)
    saver = saver_in(tmp_path, copies=copies)
    with pytest.raises(CheckpointError, match="node7"):
        state_after(3).save(saver, TEXTS)
        saver.finish()
    saver.finish()
    assert saver.last_good() == "there is no checkpoint yet"


def test_last_good_says_so_if_none_verifies(tmp_path: Path) -> None:
    folder = state_after(3).save(store_in(tmp_path), TEXTS)
    (folder / "state.json").unlink()
    assert "none of its 1 checkpoints verifies" in saver_in(tmp_path).last_good()


def test_a_host_without_memory_for_a_copy_saves_without(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    def refused(*_: Any) -> None:
        raise InputError("pinned memory: no")

    monkeypatch.setattr("bigtrain.checkpoint.snapshot.Snapshot.take", refused)
    saver = saver_in(tmp_path, copies=True)
    for steps in (3, 4):
        state_after(steps).save(saver, TEXTS)
        assert holds(tmp_path / f"step-0000000{steps}", state_after(steps))
    assert capsys.readouterr().err.count("no host memory for a copy: pinned memory: no") == 1


def on_ranks_with_threads(size: int, work: Callable[[World, World], Any]) -> list[Any]:
    """Run ranks that have a second world for their background threads."""
    apart = Meeting(size)
    return on_ranks(size, lambda world: work(world, ThreadWorld(world.rank, size, world.rank, size, apart)))


def test_ranks_save_in_the_background_while_they_talk(tmp_path: Path) -> None:
    def work(world: World, apart: World) -> None:
        store = store_in(tmp_path, world=world)
        saver = Saver(store, world, copies=True, background=apart)
        for steps in (3, 4, 5):
            state_after(steps, world).save(saver, TEXTS)
            assert [world.sum([1.0]) for _ in range(20)] == [[3.0]] * 20
        saver.require(5)

    succeeded(on_ranks_with_threads(3, work))
    assert [folder.name for folder in step_folders(tmp_path)] == [f"step-0000000{step}" for step in (5, 4, 3)]


def test_what_one_rank_is_refused_is_told_once_and_holds_for_all(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    plain = CheckpointStore.save

    def save(store: CheckpointStore, step: int, files: Any, *rest: Any) -> Path:
        if any(name.startswith("weights-00001") for name in files):
            files = {f"no-such-folder/{name}": content for name, content in files.items()}
        return plain(store, step, files, *rest)

    monkeypatch.setattr(CheckpointStore, "save", save)

    def work(world: World, apart: World) -> str:
        saver = Saver(store_in(tmp_path, world=world), world, copies=True, background=apart)
        state_after(3, world).save(saver, TEXTS)
        with pytest.raises(BigtrainError, match="step 3 could not be saved: .*No such file") as caught:
            saver.require(3)
        return str(caught.value)

    told = succeeded(on_ranks_with_threads(2, work))
    assert all("no-such-folder" in text for text in told)
    (line,) = [line for line in capsys.readouterr().err.splitlines() if "is not saved" in line]
    assert "rank 1 on " in line


@pytest.mark.slow
def test_the_host_memory_of_a_save(tmp_path: Path) -> None:
    """Streaming takes a tenth of the state or less, a copy the state and as much; 48 MiB here."""
    (told,) = told_by_all([save_memory.__file__, tmp_path], 1)
    streaming, copying = told
    assert streaming["more"] <= 0.1 * streaming["state"]
    assert 0.9 * copying["state"] <= copying["more"] <= 1.1 * copying["state"]
    print(told)


@pytest.mark.slow
def test_two_ranks_over_gloo_save_in_the_background(tiny_recipes: dict[str, Path], tmp_path: Path) -> None:
    """The background threads have a group of their own: the run ends as one that waits for its saves, to the bit."""
    ranks = run_group([rank_copying.__file__, tiny_recipes["gpt"], tmp_path], 2)
    assert [rank.code for rank in ranks] == [0, 0], ranks
    digests = [
        [manifest.read(tmp_path / run / "step-00000012")["files"][name]["sha256"] for name in NAMES]
        for run in ("copying", "waiting")
    ]
    assert digests[0] == digests[1]
    assert [manifest.step_of(folder) for folder in step_folders(tmp_path / "copying")] == [12, 10, 8]


NAMES = [f"{kind}-0000{rank}-of-00002.safetensors" for kind in ("weights", "optimizer") for rank in range(2)]


def test_where_those_that_were_due_are_damaged_one_goes_back_to_another(tmp_path: Path) -> None:
    saver = saver_in(tmp_path, copies=False)
    state_after(4).save(saver, TEXTS)
    folder = state_after(5).save(saver, TEXTS)
    (tmp_path / "step-00000004" / "state.json").write_text("{}")
    assert saver.back_to(4) == folder
