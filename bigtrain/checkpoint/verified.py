"""Whether a checkpoint is what its manifest says: complete, undamaged, of this step and of this run."""

from __future__ import annotations

import platform
from collections.abc import Collection, Mapping
from functools import partial
from pathlib import Path
from typing import Any

from bigtrain.checkpoint import manifest, tensors
from bigtrain.checkpoint.together import together
from bigtrain.errors import CheckpointError, NewerFormat
from bigtrain.world import ALONE, World


def verify(folder: Path, world: World = ALONE) -> None:
    """Hold a whole checkpoint against its manifest, each rank some files.

    Raises CheckpointError naming the first file that differs, and where a rank does not see the folder.
    """
    fault = fault_of(folder, world)
    if fault is not None:
        raise CheckpointError(fault)


def is_verified(folder: Path) -> bool:
    """Tell whether a checkpoint is complete and undamaged. Raises NewerFormat."""
    return fault_of(folder) is None


def fault_of(folder: Path, world: World = ALONE, recipes: Collection[str] | None = None) -> str | None:
    """Return what is wrong with a checkpoint, the same on all ranks.

    `recipes` are hashes of those that its run has gone by; a checkpoint of another recipe is of another run. Files that
    the manifest does not name are passed over: nothing reads them. Raises NewerFormat for one of a later bigtrain.
    """
    found = together(world, partial(_fault_of_share, folder, world, recipes))
    faults = [report for report in found if report["fault"] is not None]
    if not faults:
        return None
    if faults[0]["newer"]:
        raise NewerFormat(str(faults[0]["fault"]))
    return str(faults[0]["fault"])


def looks_whole(folder: Path) -> bool:
    """Tell whether a checkpoint's files have their sizes, without reading them."""
    try:
        files = manifest.read(folder)["files"]
        return all((folder / name).stat().st_size == expected["size"] for name, expected in files.items())
    except (CheckpointError, OSError):
        return False


def check_seen(folder: Path) -> None:
    """Raise CheckpointError unless this host sees a folder that the first rank sees."""
    if not folder.is_dir():
        raise CheckpointError(
            f"{folder}: is not there on {platform.node()}; a run folder must be on a file system that all nodes share"
        )


def is_of_other_run(content: Mapping[str, Any], recipes: Collection[str] | None) -> bool:
    """Tell whether a manifest names a recipe that is none of these; one of an older bigtrain names none."""
    return recipes is not None and content.get("recipe") is not None and content["recipe"] not in recipes


def _fault_of_share(folder: Path, world: World, recipes: Collection[str] | None) -> dict[str, Any]:
    if world.size > 1:
        check_seen(folder)
    try:
        if folder.is_symlink():
            raise CheckpointError(f"{folder}: a link, which may lead anywhere; give the folder itself")
        content = manifest.read(folder)
        if is_of_other_run(content, recipes):
            raise CheckpointError(f"{folder}: of another run: its recipe is not the one that this folder is for")
        for name, expected in list(content["files"].items())[world.rank :: world.size]:
            _verify_file(folder / name, expected)
    except CheckpointError as error:
        return {"fault": str(error), "newer": isinstance(error, NewerFormat)}
    except OSError as error:  # a disk that cannot be read is damage, of one file
        return {"fault": f"{error.filename or folder}: damaged: {error.strerror}", "newer": False}
    return {"fault": None}


def _verify_file(path: Path, expected: Mapping[str, Any]) -> None:
    if not path.is_file() or path.is_symlink():
        raise CheckpointError(f"{path}: missing, or a link")
    if path.stat().st_size != expected["size"]:
        raise CheckpointError(f"{path}: damaged: {path.stat().st_size} bytes instead of {expected['size']}")
    with tensors.named(path):
        found = tensors.digest(path)
    if found._asdict() != expected:
        raise CheckpointError(f"{path}: damaged: its SHA-256 is not the one in the manifest")
