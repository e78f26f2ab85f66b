"""Whether the disk has room."""

from __future__ import annotations

import shutil
from pathlib import Path
from types import SimpleNamespace

import pytest

from bigtrain.checkpoint.space import free_bytes, space_warning


def test_what_is_free_where_a_folder_will_be(tmp_path: Path) -> None:
    assert free_bytes(tmp_path / "not" / "yet") > 0  # type: ignore[operator]


def test_less_than_two_checkpoints_is_told(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(shutil, "disk_usage", lambda _: SimpleNamespace(free=3 * 2**20))
    assert space_warning(tmp_path, 3 * 2**19, keep=3) is None
    line = space_warning(tmp_path / "run", 2**21, keep=3)
    assert line is not None
    assert line.startswith(f"{tmp_path}/run: 3.00 MiB are free, and two checkpoints take 4.00 MiB (")


def test_a_system_that_does_not_tell_is_no_warning(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def refused(_: Path) -> None:
        raise OSError(13, "Permission denied")

    monkeypatch.setattr(shutil, "disk_usage", refused)
    assert space_warning(tmp_path, 2**60, keep=3) is None
