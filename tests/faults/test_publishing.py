"""Rows C1 and C4 of the fault matrix: a save that is killed at any operation, and one that the disk refuses."""

from __future__ import annotations

import errno
import json
import shutil
import signal
import subprocess
import sys
from pathlib import Path

import full_disk
import pytest
import torch
from disk import KillAt, RefuseAt, in_child, watched
from matrix import Counts, counted
from published import NEW, SCENES, before_plain, save_new, survived
from tiny_state import TEXTS, saver_in, state_after

from bigtrain.errors import BigtrainError


def kill_everywhere(scene: str, half: bool, folder: Path, counts: Counts) -> int:
    """Kill a save at one operation after another until it comes to its end; return how many operations it has."""
    prepare, copies = SCENES[scene]
    prepare(folder / "before")
    state, next_state = state_after(NEW), state_after(NEW + 1)
    number = 0
    while True:
        work = folder / "run"
        shutil.copytree(folder / "before", work)

        def save_and_die(work: Path = work, number: int = number) -> None:
            torch.set_num_threads(1)
            with watched(work, KillAt(number, half=half)):
                save_new(work, state, copies=copies)

        code = in_child(save_and_die)
        assert code in (0, -signal.SIGKILL)
        good = survived(work, scene, next_state)
        shutil.rmtree(work)
        if code == 0:
            assert good
            return number
        counts.add(good, f"{scene}, operation {number}, half={half}")
        number += 1


@pytest.mark.slow
def test_c1_killed_at_every_operation(quick_path: Path) -> None:
    with counted("C1", "ci") as counts:
        for scene in SCENES:
            for half in (False, True) if scene == "plain" else (True,):
                operations = kill_everywhere(scene, half, quick_path / f"{scene} {half}", counts)
                counts.longest(f"operations of a save, {scene}", operations)
        assert counts.tried >= 200


ERRORS = (errno.ENOSPC, errno.EDQUOT, errno.EIO, errno.EROFS)


def refused_once(work: Path, hook: RefuseAt, *, copies: bool, told: pytest.CaptureFixture[str]) -> str | None:
    """Save while the disk refuses something; return what is wrong with how the run takes it, if anything."""
    saver = saver_in(work, keep=2, copies=copies)
    with watched(work, hook):
        state_after(NEW).save(saver, TEXTS)
        saver.finish()
    lines = [line for line in told.readouterr().err.splitlines() if "is not saved" in line]
    if len(lines) != (not saver.has(NEW)):
        return f"{len(lines)} lines"
    if lines and not (str(work) in lines[0] and "it needs " in lines[0] and " are free" in lines[0]):
        return lines[0]
    return None if survived(work, "plain", state_after(NEW + 1)) else "not survived"


@pytest.mark.slow
def test_c4_refused_at_every_operation(quick_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    with counted("C4", "ci", "errors") as counts:
        for scene in ("plain", "retention"):
            SCENES[scene][0](quick_path / scene)
            for error in ERRORS:
                refuse_everywhere(quick_path / scene, error, False, counts, capsys)
        for error in (errno.ENOSPC, errno.EROFS):
            refuse_everywhere(quick_path / "plain", error, True, counts, capsys)


def refuse_everywhere(before: Path, error: int, on: bool, counts: Counts, capsys: pytest.CaptureFixture[str]) -> None:
    number = 0
    while True:
        work = before.with_name("run")
        shutil.copytree(before, work)
        hook = RefuseAt(number, error, on=on)
        wrong = refused_once(work, hook, copies=number % 2 == 1, told=capsys)
        shutil.rmtree(work)
        if not hook.refused:
            return
        counts.add(wrong is None, f"{before.name}, {errno.errorcode[error]} at {number}, on={on}: {wrong}")
        number += 1


def test_a_save_that_must_be_ends_the_run_where_the_disk_refuses_it(tmp_path: Path) -> None:
    before_plain(tmp_path / "run")
    for copies in (False, True):
        saver = saver_in(tmp_path / "run", copies=copies)
        with watched(tmp_path / "run", RefuseAt(3, errno.ENOSPC)):
            state_after(NEW).save(saver, TEXTS)
            saver.finish()
        with pytest.raises(
            BigtrainError, match=r"step 4 could not be saved: .*No space left.*step-00000003$"
        ) as caught:
            saver.require(NEW)
        assert caught.value.exit_code == 1


@pytest.mark.slow
def test_c4_a_disk_that_is_full(tiny_recipes: dict[str, Path], tmp_path: Path) -> None:
    """A file system of 8 MiB in memory, in a namespace of its own; without those, other tests refuse what it would."""
    mount = f"mount -t tmpfs -o size=8m tmpfs {tmp_path}/disk"
    if (
        shutil.which("unshare") is None
        or subprocess.run(
            ["unshare", "-rm", "sh", "-c", mount.replace(f"{tmp_path}/disk", "/mnt")], capture_output=True, check=False
        ).returncode
    ):
        pytest.skip("this system lets nobody mount a file system of their own")
    (tmp_path / "disk").mkdir()
    script = f"{mount} && exec {sys.executable} {Path(full_disk.__file__)} {tiny_recipes['gpt']} {tmp_path}/disk"
    ended = subprocess.run(["unshare", "-rm", "sh", "-c", script], capture_output=True, text=True, check=False)
    full, after = [json.loads(line) for line in ended.stdout.splitlines() if line.startswith("{")]
    with counted("C4", "ci", "full") as counts:
        lines = [line for line in ended.stderr.splitlines() if "step 10 is not saved" in line]
        told = (
            len(lines) == 1 and f"{tmp_path}/disk/run/" in lines[0] and "No space left on device; it needs" in lines[0]
        )
        counts.add(told, f"one line names the path and the bytes: {ended.stderr[-2000:]}")
        counts.add(full["logged"] == list(range(1, 13)), f"the run goes on: {full}")
        counts.add(full["saved"] == ["step-00000005"], f"the checkpoint before is intact: {full}")
        counts.add(full["ended"][0] == 1 and full["ended"][1].endswith("run/step-00000005"), f"the end is told: {full}")
        counts.add(
            after["ended"] == 0 and after["saved"][0] == "step-00000012", f"with room it comes to its end: {after}"
        )
        counts.add("two checkpoints take" in ended.stdout, "too little disk is told at the start")
