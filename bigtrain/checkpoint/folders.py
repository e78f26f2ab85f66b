"""Folders on disk: names in them are safe once the folder itself is synced."""

from __future__ import annotations

import os
from pathlib import Path

from bigtrain.checkpoint.tensors import named


def sync_folder(folder: Path) -> None:
    """Have the disk keep which files a folder has, by which names. Raises OSError that names the folder."""
    with named(folder):
        handle = os.open(folder, os.O_RDONLY)
        try:
            os.fsync(handle)
        finally:
            os.close(handle)
