"""Checkpoints of a run on disk: written aside, synced, digested, renamed; the newest that verifies counts."""

from __future__ import annotations

import fcntl
import os
import platform
import re
import shutil
import sys
import uuid
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from functools import partial
from pathlib import Path
from typing import Any

from torch import Tensor

from bigtrain.checkpoint import manifest, tensors
from bigtrain.checkpoint.together import together
from bigtrain.errors import CheckpointError, ResumeError
from bigtrain.fault_points import reached
from bigtrain.sharding.part import Part
from bigtrain.world import ALONE, World

_ASIDE = re.compile(r"\.tmp-\d+-[0-9a-f]{8}")

LOCK_FILE = ".lock"


@contextmanager
def only_user_of(run_dir: Path) -> Iterator[None]:
    """Hold a run folder for this process; the hold ends with the process, however that ends.

    Raises ResumeError if another process holds it, naming that.
    """
    with (run_dir / LOCK_FILE).open("a+") as file:
        try:
            fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError:
            file.seek(0)
            raise ResumeError(
                f"{run_dir}: in use by {file.read() or 'another process'}; wait for it, or stop it"
            ) from None
        file.truncate(0)
        file.write(f"process {os.getpid()} on {platform.node()}")
        file.flush()
        yield


class CheckpointStore:
    """The checkpoints of one run folder. At least the newest `keep` that were published stay.

    On several ranks, `world`, all call `save` and `newest` together, and what fails on one of them fails on all.
    """

    def __init__(self, run_dir: Path, *, keep: int = 3, world: World = ALONE) -> None:
        self.run_dir = run_dir
        self._keep = keep
        self._world = world

    def save(
        self,
        step: int,
        tensor_files: Mapping[str, Mapping[str, Tensor]],
        texts: Mapping[str, str],
        parts: Mapping[str, Mapping[str, Part]] | None = None,
    ) -> Path:
        """Publish a checkpoint and return its folder; until its rename nothing of it counts.

        `tensor_files` are the safetensors files that this rank writes, by names that no other rank's have, `parts`
        those of their tensors that are parts of larger ones. `texts` are small files by name, which the first rank
        writes. Nothing is written over: a folder of this step that does not verify is moved aside first, one that does
        is kept as it is.
        """
        final, first = self.run_dir / manifest.folder_name(step), self._world.first
        begun = together(self._world, lambda: {"aside": self._begin(final, step) if first else None})
        if begun[0]["aside"] is None:
            return final
        aside = self.run_dir / begun[0]["aside"]
        try:
            own = partial(_write_files, aside, tensor_files, texts if first else {}, parts or {})
            files = {name: digest for written in together(self._world, own) for name, digest in written.items()}
            together(self._world, lambda: self._publish(aside, final, {"step": step, "files": files}) if first else {})
        except BaseException:
            if first:
                shutil.rmtree(aside, ignore_errors=True)
            raise
        return final

    def newest(self) -> Path | None:
        """Return the newest checkpoint that verifies; those passed over are named on standard error.

        Returns None where no checkpoint was ever published. Raises CheckpointError if there are some and none verifies,
        and if a rank does not see what the first one does.
        """
        first = self._world.first
        found: list[str] = together(self._world, lambda: {"names": _names(self.run_dir) if first else None})[0]["names"]
        for folder in (self.run_dir / name for name in found):
            fault = _fault(folder, self._world)
            if fault is None:
                return folder
            if first:
                print(f"passed over: {fault}", file=sys.stderr)
        if found:
            raise CheckpointError(
                f"{self.run_dir}: none of its {len(found)} checkpoints verifies; start a new run folder"
            )
        return None

    def _begin(self, final: Path, step: int) -> str | None:
        """Make a folder to write in and return its name; None if the step is saved already."""
        if final.exists() and is_verified(final):
            return None
        aside = self.run_dir / f".tmp-{step}-{uuid.uuid4().hex[:8]}"
        aside.mkdir(parents=True)
        return aside.name

    def _publish(self, aside: Path, final: Path, content: Mapping[str, Any]) -> dict[str, Any]:
        tensors.write_bytes(aside / manifest.MANIFEST, manifest.encode(content))
        _sync_folder(aside)
        _move_aside(final)
        reached("publish", content["step"])
        aside.rename(final)
        _sync_folder(self.run_dir)
        self._remove_old(content["step"])
        return {}

    def _remove_old(self, step: int) -> None:
        complete = [folder for folder in manifest.step_folders(self.run_dir) if (folder / manifest.MANIFEST).is_file()]
        # Later steps than the one just saved are of a time before a restart: they did not verify.
        own = [folder for folder in complete if manifest.step_of(folder) <= step]
        for folder in own[self._keep :]:
            shutil.rmtree(folder)
        for debris in self.run_dir.glob(".tmp-*"):
            if _ASIDE.fullmatch(debris.name):
                shutil.rmtree(debris, ignore_errors=True)


def verify(folder: Path, world: World = ALONE) -> None:
    """Hold a whole checkpoint against its manifest, each rank some files.

    Raises CheckpointError naming the first file that differs, and where a rank does not see the folder.
    """
    fault = _fault(folder, world)
    if fault is not None:
        raise CheckpointError(fault)


def is_verified(folder: Path) -> bool:
    """Tell whether a checkpoint is complete and undamaged."""
    return _fault(folder, ALONE) is None


def find_checkpoint(path: Path, world: World = ALONE) -> Path:
    """Return the checkpoint that a path means: itself, or the newest verified one of a run folder.

    Raises CheckpointError if there is none.
    """
    seen = together(world, lambda: {"itself": (path / manifest.MANIFEST).is_file(), "folder": path.is_dir()})[0]
    if seen["itself"]:
        verify(path, world)
        return path
    found = CheckpointStore(path, world=world).newest() if seen["folder"] else None
    if found is None:
        raise CheckpointError(f"{path}: holds no checkpoint; give a run folder, or a step-NNNNNNNN folder in one")
    return found


def _names(run_dir: Path) -> list[str]:
    return [folder.name for folder in manifest.step_folders(run_dir)]


def _check_seen(folder: Path) -> None:
    """Raise CheckpointError unless this host sees a folder that the first rank sees."""
    if not folder.is_dir():
        raise CheckpointError(
            f"{folder}: is not there on {platform.node()}; a run folder must be on a file system that all nodes share"
        )


def _write_files(
    aside: Path,
    tensor_files: Mapping[str, Mapping[str, Tensor]],
    texts: Mapping[str, str],
    parts: Mapping[str, Mapping[str, Part]],
) -> dict[str, Any]:
    """Write a rank's files and return their digests by name."""
    _check_seen(aside)
    files = {
        name: tensors.write_tensors(aside / name, content, parts.get(name)) for name, content in tensor_files.items()
    }
    files |= {name: tensors.write_bytes(aside / name, text.encode()) for name, text in texts.items()}
    _sync_folder(aside)
    return {name: digest._asdict() for name, digest in files.items()}


def _fault(folder: Path, world: World) -> str | None:
    """Return what is wrong with a checkpoint, the same on all ranks."""
    found = together(world, partial(_fault_of_share, folder, world))
    faults: list[str] = [report["fault"] for report in found if report["fault"] is not None]
    return faults[0] if faults else None


def _fault_of_share(folder: Path, world: World) -> dict[str, str | None]:
    if world.size > 1:
        _check_seen(folder)
    try:
        files = list(manifest.read(folder)["files"].items())
        for name, expected in files[world.rank :: world.size]:
            _verify_file(folder / name, expected)
    except CheckpointError as error:
        return {"fault": str(error)}
    return {"fault": None}


def _verify_file(path: Path, expected: Mapping[str, Any]) -> None:
    if not path.is_file() or path.is_symlink():
        raise CheckpointError(f"{path}: missing")
    if path.stat().st_size != expected["size"]:
        raise CheckpointError(f"{path}: damaged: {path.stat().st_size} bytes instead of {expected['size']}")
    if tensors.digest(path)._asdict() != expected:
        raise CheckpointError(f"{path}: damaged: its SHA-256 is not the one in the manifest")


def _move_aside(final: Path) -> None:
    attempt = 0
    while final.exists():
        target = final.with_name(f"bad-{final.name}-{attempt}")
        if not target.exists():
            final.rename(target)
        attempt += 1


def _sync_folder(folder: Path) -> None:
    handle = os.open(folder, os.O_RDONLY)
    try:
        os.fsync(handle)
    finally:
        os.close(handle)
