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
from pathlib import Path

from torch import Tensor

from bigtrain.checkpoint import manifest, tensors
from bigtrain.errors import CheckpointError, ResumeError

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
    """The checkpoints of one run folder. At least the newest `keep` that were published stay."""

    def __init__(self, run_dir: Path, *, keep: int = 3) -> None:
        self.run_dir = run_dir
        self._keep = keep

    def save(self, step: int, tensor_files: Mapping[str, Mapping[str, Tensor]], texts: Mapping[str, str]) -> Path:
        """Publish a checkpoint and return its folder; until its rename nothing of it counts.

        `tensor_files` are safetensors files by name, `texts` small files by name. Nothing is written over: a folder
        of this step that does not verify is moved aside first, one that does is kept as it is.
        """
        final = self.run_dir / manifest.folder_name(step)
        if final.exists() and is_verified(final):
            return final
        aside = self.run_dir / f".tmp-{step}-{uuid.uuid4().hex[:8]}"
        aside.mkdir(parents=True)
        try:
            files = {name: tensors.write_tensors(aside / name, content) for name, content in tensor_files.items()}
            files |= {name: tensors.write_bytes(aside / name, text.encode()) for name, text in texts.items()}
            content = {"step": step, "files": {name: digest._asdict() for name, digest in files.items()}}
            tensors.write_bytes(aside / manifest.MANIFEST, manifest.encode(content))
            _sync_folder(aside)
            _move_aside(final)
            aside.rename(final)
        except BaseException:
            shutil.rmtree(aside, ignore_errors=True)
            raise
        _sync_folder(self.run_dir)
        self._remove_old(step)
        return final

    def newest(self) -> Path | None:
        """Return the newest checkpoint that verifies; those passed over are named on standard error.

        Returns None where no checkpoint was ever published. Raises CheckpointError if there are some and none verifies.
        """
        folders = manifest.step_folders(self.run_dir)
        for folder in folders:
            try:
                verify(folder)
            except CheckpointError as error:
                print(f"passed over: {error}", file=sys.stderr)
            else:
                return folder
        if folders:
            raise CheckpointError(
                f"{self.run_dir}: none of its {len(folders)} checkpoints verifies; start a new run folder"
            )
        return None

    def _remove_old(self, step: int) -> None:
        complete = [folder for folder in manifest.step_folders(self.run_dir) if (folder / manifest.MANIFEST).is_file()]
        # Later steps than the one just saved are of a time before a restart: they did not verify.
        own = [folder for folder in complete if manifest.step_of(folder) <= step]
        for folder in own[self._keep :]:
            shutil.rmtree(folder)
        for debris in self.run_dir.glob(".tmp-*"):
            if _ASIDE.fullmatch(debris.name):
                shutil.rmtree(debris, ignore_errors=True)


def verify(folder: Path) -> None:
    """Hold a whole checkpoint against its manifest. Raises CheckpointError naming the first file that differs."""
    for name, expected in manifest.read(folder)["files"].items():
        path = folder / name
        if not path.is_file() or path.is_symlink():
            raise CheckpointError(f"{path}: missing")
        if path.stat().st_size != expected["size"]:
            raise CheckpointError(f"{path}: damaged: {path.stat().st_size} bytes instead of {expected['size']}")
        if tensors.digest(path)._asdict() != expected:
            raise CheckpointError(f"{path}: damaged: its SHA-256 is not the one in the manifest")


def is_verified(folder: Path) -> bool:
    """Tell whether a checkpoint is complete and undamaged."""
    try:
        verify(folder)
    except CheckpointError:
        return False
    return True


def find_checkpoint(path: Path) -> Path:
    """Return the checkpoint that a path means: itself, or the newest verified one of a run folder.

    Raises CheckpointError if there is none.
    """
    if (path / manifest.MANIFEST).is_file():
        verify(path)
        return path
    found = CheckpointStore(path).newest() if path.is_dir() else None
    if found is None:
        raise CheckpointError(f"{path}: holds no checkpoint; give a run folder, or a step-NNNNNNNN folder in one")
    return found


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
