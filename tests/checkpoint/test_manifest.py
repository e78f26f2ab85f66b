"""Manifests: any changed byte is found, no name leads outside."""

from __future__ import annotations

import json
from pathlib import Path

import pytest

from bigtrain.checkpoint import manifest
from bigtrain.errors import CheckpointError, NewerFormat

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


@pytest.mark.parametrize("version", [0, True, "1", None, -1])
def test_a_format_that_never_was_is_damage(tmp_path: Path, version: object) -> None:
    raw = manifest.encode(CONTENT | {"format_version": version})
    with pytest.raises(CheckpointError, match="not a manifest of format 1") as caught:
        manifest.read(write(tmp_path, raw))
    assert not isinstance(caught.value, NewerFormat)


@pytest.mark.parametrize("version", [3, 5, 9])
def test_one_flipped_bit_makes_no_newer_format(tmp_path: Path, version: int) -> None:
    raw = manifest.encode(CONTENT).replace(b'"format_version": 1', b'"format_version": %d' % version)
    with pytest.raises(CheckpointError, match="damaged") as caught:
        manifest.read(write(tmp_path, raw))
    assert not isinstance(caught.value, NewerFormat)


@pytest.mark.parametrize(
    "content",
    [
        {"step": "7"},
        {"step": True},
        {"files": []},
        {"files": {"a": {}}},
        {"files": {"a": {"size": 1.5, "crc32": 1, "sha256": "a"}}},
        {"files": {"a": {"size": 1, "crc32": 1, "sha256": "a", "more": 1}}},
        {"files": {"a": [1, 2, 3]}},
    ],
)
def test_what_is_no_manifest_though_its_digest_fits(tmp_path: Path, content: dict[str, object]) -> None:
    with pytest.raises(CheckpointError, match="not a manifest"):
        manifest.read(write(tmp_path, manifest.encode(CONTENT | content)))


@pytest.mark.parametrize("raw", [b"[" * 100_000, b"[]", b"1", b"\xff", b"9" * 5000])
def test_hostile_bytes(tmp_path: Path, raw: bytes) -> None:
    with pytest.raises(CheckpointError, match="damaged"):
        manifest.read(write(tmp_path, raw))


def test_a_step_must_be_that_of_its_folder(tmp_path: Path) -> None:
    folder = tmp_path / "step-00000008"
    folder.mkdir()
    with pytest.raises(CheckpointError, match="damaged: it is of step 7"):
        manifest.read(write(folder, manifest.encode(CONTENT)))
