"""Checkpoints of a run on disk: written aside, synced, digested, renamed; the newest that verifies counts."""

from __future__ import annotations

import copy
import os
import shutil
import sys
from collections.abc import Callable, Collection, Mapping
from functools import partial
from pathlib import Path
from typing import Any, Self

from torch import Tensor

from bigtrain.checkpoint import manifest, retention, tensors
from bigtrain.checkpoint.folders import sync_folder
from bigtrain.checkpoint.lineage import Identity
from bigtrain.checkpoint.together import together
from bigtrain.checkpoint.verified import check_seen, fault_of, is_of_other_run, looks_whole, verify
from bigtrain.errors import CheckpointError, NewerFormat
from bigtrain.fault_points import reached
from bigtrain.sharding.part import Part
from bigtrain.world import ALONE, World


class CheckpointStore:
    """The checkpoints of one run folder. The newest `keep` that verify stay, and whatever is newer than these.

    On several ranks, `world`, all call `save` and `newest` together, and what fails on one of them fails on all. With
    an `identity` it goes into manifests, and checkpoints of another run are passed over. `keep` is 2 or more.
    """

    def __init__(self, run_dir: Path, *, keep: int = 3, world: World = ALONE, identity: Identity | None = None) -> None:
        if keep < retention.LEAST_KEPT:
            raise ValueError(f"keep={keep}: use {retention.LEAST_KEPT} or more; the newest checkpoint may be damaged")
        self.run_dir = run_dir
        self.needed_bytes = 0
        """What the newest save writes, all ranks together; of what is not a tensor only the texts."""
        self.under_way: Callable[[], None] | None = None
        """Waits for a save that another thread makes, before the newest is looked for."""
        self._keep = keep
        self._world = world
        self._identity = identity
        self._found: dict[str, bool] = {}
        """Whether a folder verifies, of those that this process has published or verified."""

    def over(self, world: World) -> Self:
        """Return this store for the same ranks, which talk another way; what is known of folders is shared."""
        other = copy.copy(self)
        other._world = world
        return other

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
        is kept as it is. What the disk refuses is an OSError on all ranks; the earlier checkpoints are as they were.
        """
        final, first = self.run_dir / manifest.folder_name(step), self._world.first
        own_bytes = _bytes_of(tensor_files, texts if first else {})
        self.needed_bytes = int(self._world.sum([own_bytes])[0])
        begun = together(self._world, lambda: {"aside": self._begin(final, step) if first else None})
        if begun[0]["aside"] is not None:
            self._write(self.run_dir / begun[0]["aside"], final, tensor_files, texts, parts or {})
        self._found[final.name] = True
        try:
            self._remove_old(step)
        except OSError as error:
            if first:
                print(f"warning: {self.run_dir}: older checkpoints are not removed: {error}", file=sys.stderr)
        return final

    def newest(self, *, every: int = 1) -> Path | None:
        """Return the newest checkpoint that verifies; those passed over are named on standard error.

        With `every`, only those at a multiple of so many steps count. Returns None where none was ever published.
        Raises CheckpointError if there are some and none verifies, if a rank does not see what the first one does, and
        NewerFormat before it passes over one of a later bigtrain.
        """
        if self.under_way is not None:
            self.under_way()
        found = self._listed(
            lambda: [it for it in manifest.step_folders(self.run_dir) if not manifest.step_of(it) % every]
        )
        for name in found:
            fault = self._fault(name)
            if fault is None:
                return self.run_dir / name
            if self._world.first:
                print(f"passed over: {fault}", file=sys.stderr)
        if found:
            raise CheckpointError(
                f"{self.run_dir}: none of its {len(found)} checkpoints verifies; start a new run folder"
            )
        return None

    def set_aside_after(self, step: int) -> None:
        """Give other names to the checkpoints of later steps, which then count no more."""

        def work() -> dict[str, Any]:
            for folder in manifest.step_folders(self.run_dir) if self._world.first else []:
                if manifest.step_of(folder) > step:
                    _move_aside(folder)
            return {}

        together(self._world, work)
        for name in [name for name in self._found if manifest.step_of(Path(name)) > step]:
            del self._found[name]  # in place: `over` shares it

    def _begin(self, final: Path, step: int) -> str | None:
        """Make a folder to write in and return its name; None if the step is saved already."""
        retention.remove_debris(self.run_dir)
        if final.is_dir() and not final.is_symlink() and fault_of(final, recipes=self._recipes) is None:
            sync_folder(self.run_dir)  # the save that renamed it may have failed right after that
            return None
        aside = self.run_dir / retention.aside_name(step)
        with tensors.named(aside):
            aside.mkdir(parents=True)
        return aside.name

    def _write(
        self,
        aside: Path,
        final: Path,
        tensor_files: Mapping[str, Mapping[str, Tensor]],
        texts: Mapping[str, str],
        parts: Mapping[str, Mapping[str, Part]],
    ) -> None:
        first = self._world.first
        try:
            own = partial(_write_files, aside, tensor_files, texts if first else {}, parts)
            files = {name: digest for written in together(self._world, own) for name, digest in written.items()}
            together(self._world, lambda: self._publish(aside, final, files) if first else {})
        except BaseException:
            if first:
                shutil.rmtree(aside, ignore_errors=True)
            raise

    def _publish(self, aside: Path, final: Path, files: Mapping[str, Any]) -> dict[str, Any]:
        step, known = manifest.step_of(final), self._identity
        content = {"step": step, "files": files, "world_size": self._world.size}
        content |= {} if known is None else {"recipe": known.recipe, "data": known.data}
        tensors.write_bytes(aside / manifest.MANIFEST, manifest.encode(content))
        sync_folder(aside)
        _move_aside(final)
        reached("publish", step)
        aside.rename(final)
        sync_folder(self.run_dir)
        if not self._found:  # the run folder itself may be new
            sync_folder(self.run_dir.absolute().parent)
        return {}

    def _remove_old(self, step: int) -> None:
        """Remove what enough newer ones stand for.

        Later steps than the one just saved are of a time before a restart or a rollback: they neither count nor go.
        """
        names = self._listed(lambda: [folder for folder in self._own() if manifest.step_of(folder) <= step])
        for name in self._listed(lambda: [folder for folder in self._own() if not looks_whole(folder)]):
            self._found.pop(name, None)  # somebody has been at it since
        old = retention.superseded(names, self._keep, self._verifies)

        def work() -> dict[str, Any]:
            for name in old if self._world.first else []:
                retention.remove(self.run_dir / name)
            return {}

        together(self._world, work)

    def _own(self) -> list[Path]:
        """Return what has a manifest and is not known to be of another run, or of a later bigtrain."""
        folders = manifest.step_folders(self.run_dir)
        return [folder for folder in folders if not folder.is_symlink() and _may_go(folder, self._recipes)]

    def _listed(self, folders: Callable[[], list[Path]]) -> list[str]:
        """Return the names of folders as the first rank sees them."""
        first = self._world.first
        told = together(self._world, lambda: {"names": [folder.name for folder in folders()] if first else None})
        names: list[str] = told[0]["names"]
        return names

    def _verifies(self, name: str) -> bool:
        """Tell whether a folder verifies, as it was found once; said on standard error if it does not."""
        if name not in self._found:
            fault = self._fault(name)
            if fault is not None and self._world.first:
                print(f"does not count as kept: {fault}", file=sys.stderr)
        return self._found[name]

    def _fault(self, name: str) -> str | None:
        """Return what is wrong with a folder of this run, the same on all ranks."""
        fault = fault_of(self.run_dir / name, self._world, self._recipes)
        self._found[name] = fault is None
        return fault

    @property
    def _recipes(self) -> Collection[str] | None:
        return None if self._identity is None else self._identity.recipes


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


def _may_go(folder: Path, recipes: Collection[str] | None) -> bool:
    try:
        return not is_of_other_run(manifest.read(folder), recipes)
    except CheckpointError as error:
        return not isinstance(error, NewerFormat) and (folder / manifest.MANIFEST).is_file()


def _bytes_of(tensor_files: Mapping[str, Mapping[str, Tensor]], texts: Mapping[str, str]) -> int:
    tensor_bytes = sum(tensor.nbytes for content in tensor_files.values() for tensor in content.values())
    return tensor_bytes + sum(len(text.encode()) for text in texts.values())


def _write_files(
    aside: Path,
    tensor_files: Mapping[str, Mapping[str, Tensor]],
    texts: Mapping[str, str],
    parts: Mapping[str, Mapping[str, Part]],
) -> dict[str, Any]:
    """Write a rank's files and return their digests by name."""
    check_seen(aside)
    files = {
        name: tensors.write_tensors(aside / name, content, parts.get(name)) for name, content in tensor_files.items()
    }
    files |= {name: tensors.write_bytes(aside / name, text.encode()) for name, text in texts.items()}
    sync_folder(aside)
    return {name: digest._asdict() for name, digest in files.items()}


def _move_aside(final: Path) -> None:
    """Give another name to what stands in the way, whatever it is."""
    attempt = 0
    while os.path.lexists(final):
        target = final.with_name(f"bad-{final.name}-{attempt}")
        if not os.path.lexists(target):
            final.rename(target)
        attempt += 1
