"""What goes from a run folder: checkpoints that enough newer ones stand for, and what dead saves left. No torch."""

from __future__ import annotations

import re
import shutil
import sys
import uuid
from collections.abc import Callable, Sequence
from contextlib import suppress
from pathlib import Path

from bigtrain.checkpoint import manifest

LEAST_KEPT = 2
"""The newest may be damaged; the one before it is then what is left."""

_ASIDE = re.compile(r"\.tmp-\d+-[0-9a-f]{8}")


def aside_name(step: int) -> str:
    """Return a new name for a folder that does not count: one that is being written, or removed."""
    return f".tmp-{step}-{uuid.uuid4().hex[:8]}"


def superseded(names: Sequence[str], keep: int, verifies: Callable[[str], bool]) -> list[str]:
    """Return those of some checkpoints, newest first, that are older than `keep` which verify.

    No more are asked about than that takes, and none where there are not more than `keep`.
    """
    if len(names) <= keep:
        return []
    good = 0
    for index, name in enumerate(names):
        good += verifies(name)
        if good == keep:
            return list(names[index + 1 :])
    return []


def remove(folder: Path) -> None:
    """Remove a checkpoint: at once by its name, then its files, so that a crash leaves no half of it.

    What cannot be removed is said on standard error, and nothing is lost by it.
    """
    aside = folder.with_name(aside_name(manifest.step_of(folder)))
    try:
        folder.rename(aside)
    except OSError as error:
        print(f"warning: {folder}: not removed: {error.strerror}", file=sys.stderr)
        return
    shutil.rmtree(aside, ignore_errors=True)  # what is left is debris, which the next save tries to remove


def remove_debris(run_dir: Path) -> None:
    """Remove what saves left that did not come to their end, as far as that can be done; it never stops the next."""
    with suppress(OSError):
        for debris in run_dir.glob(".tmp-*"):
            if _ASIDE.fullmatch(debris.name) and not debris.is_symlink():
                shutil.rmtree(debris, ignore_errors=True)
