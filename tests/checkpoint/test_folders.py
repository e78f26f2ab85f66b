"""What names a folder has is brought to the disk, and what fails names the folder."""

from __future__ import annotations

import errno
import os
from pathlib import Path

import pytest

from bigtrain.checkpoint.folders import sync_folder


def test_a_folder_is_synced_and_closed(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    synced: list[tuple[int, int]] = []

    def noted(handle: int) -> None:
        synced.append((handle, os.fstat(handle).st_ino))

    monkeypatch.setattr(os, "fsync", noted)
    sync_folder(tmp_path)
    ((handle, inode),) = synced
    assert inode == tmp_path.stat().st_ino
    with pytest.raises(OSError):
        os.fstat(handle)


def test_what_fails_names_the_folder(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def refused(handle: int) -> None:
        raise OSError(errno.EIO, "Input/output error")

    with pytest.raises(FileNotFoundError) as absent:
        sync_folder(tmp_path / "absent")
    assert absent.value.filename == str(tmp_path / "absent")
    monkeypatch.setattr(os, "fsync", refused)
    with pytest.raises(OSError) as failed:
        sync_folder(tmp_path)
    assert (failed.value.errno, failed.value.filename) == (errno.EIO, str(tmp_path))
