"""Manifests: any changed byte is found, no name leads outside."""

from __future__ import annotations

import json
from pathlib import Path

import pytest

from bigtrain.checkpoint import manifest
from bigtrain.errors import CheckpointError

CONTENT = {"step": 7, "files": {"weights.safetensors": {"size": 3, "crc32": 1, "sha256": "ab"}}}


def write(folder: Path, raw: bytes) -> Path:
    (folder / manifest.MANIFEST).write_bytes(raw)
    return folder


def test_what_is_encoded_is_read(tmp_path: Path) -> None:
    read = manifest.read(write(tmp_path, manifest.encode(CONTENT)))
    assert read["files"] == CONTENT["files"]
    assert read["step"] == 7
    assert read["format_version"] == manifest.FORMAT_VERSION


def test_every_changed_byte_is_found(tmp_path: Path) -> None:
    raw = manifest.encode(CONTENT)
    for i in range(len(raw)):
        changed = bytearray(raw)
        changed[i] ^= 1 << (i % 8)
        with pytest.raises(CheckpointError):
            manifest.read(write(tmp_path, bytes(changed)))


def test_every_cut_is_found(tmp_path: Path) -> None:
    raw = manifest.encode(CONTENT)
    for length in range(len(raw)):
        with pytest.raises(CheckpointError):
            manifest.read(write(tmp_path, raw[:length]))


def test_absent(tmp_path: Path) -> None:
    with pytest.raises(CheckpointError, match="not a complete checkpoint"):
        manifest.read(tmp_path)


def test_a_newer_format_is_named(tmp_path: Path) -> None:
    newer = json.loads(manifest.encode(CONTENT)) | {"format_version": manifest.FORMAT_VERSION + 1}
    with pytest.raises(CheckpointError, match="newer than this bigtrain reads"):
        manifest.read(write(tmp_path, json.dumps(newer).encode()))


@pytest.mark.parametrize("name", ["../x", "/etc/passwd", "a/b", ".hidden", "A", "", "x\n"])
def test_a_name_that_leads_elsewhere_is_refused(tmp_path: Path, name: str) -> None:
    raw = manifest.encode({"step": 1, "files": {name: {"size": 1, "crc32": 1, "sha256": "a"}}})
    with pytest.raises(CheckpointError, match="does not belong in a checkpoint"):
        manifest.read(write(tmp_path, raw))


def test_step_folders_newest_first(tmp_path: Path) -> None:
    for name in ("step-00000005", "step-00000040", "step-123456789", "step-x", ".tmp-5-a", "bad-step-00000005-0"):
        (tmp_path / name).mkdir()
    (tmp_path / "step-00000099").write_text("a file")
    assert [manifest.step_of(folder) for folder in manifest.step_folders(tmp_path)] == [123456789, 40, 5]
    assert manifest.folder_name(40) == "step-00000040"
