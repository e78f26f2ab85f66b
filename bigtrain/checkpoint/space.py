"""Whether the disk has room for a run's checkpoints. No torch."""

from __future__ import annotations

import shutil
from pathlib import Path

from bigtrain.checkpoint.retention import LEAST_KEPT
from bigtrain.units import format_bytes


def free_bytes(folder: Path) -> int | None:
    """Return what is free where a folder is or will be; None where the system does not tell."""
    try:
        there = next(place for place in (folder, *folder.absolute().parents) if place.is_dir())
        return shutil.disk_usage(there).free
    except (OSError, StopIteration):
        return None


def space_warning(folder: Path, checkpoint_bytes: int, keep: int) -> str | None:
    """Return a line for a disk that has no room for two checkpoints beside what is there; None if it has."""
    free, needed = free_bytes(folder), LEAST_KEPT * checkpoint_bytes
    if free is None or free >= needed:
        return None
    return (
        f"{folder}: {format_bytes(free)} are free, and two checkpoints take {format_bytes(needed)} "
        f"(checkpoint.keep={keep} and the one being written {format_bytes((keep + 1) * checkpoint_bytes)}); "
        "free some, or name another --run-dir"
    )
