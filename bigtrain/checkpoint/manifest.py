"""A checkpoint's manifest: what belongs to it, with digests, itself digested: any changed byte is found. No torch."""

from __future__ import annotations

import hashlib
import json
import re
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from bigtrain import strict_json
from bigtrain.errors import CheckpointError, NewerFormat

MANIFEST = "manifest.json"
FORMAT_VERSION = 1
MAX_MANIFEST_BYTES = 4 * 2**20
"""Of 1,000 ranks it has 0.5 MB. A hostile one of this size takes tens of megabytes to parse."""

_SAFE_NAME = re.compile(r"[a-z0-9][a-z0-9._-]*")
_STEP_FOLDER = re.compile(r"step-(\d{8,})")
_FILE_KEYS = {"size": int, "crc32": int, "sha256": str}


def encode(content: Mapping[str, Any]) -> bytes:
    """Return a manifest's bytes: its content and the SHA-256 of that content's canonical form."""
    return _sealed({"format_version": FORMAT_VERSION, **content})


def _sealed(body: Mapping[str, Any]) -> bytes:
    return (json.dumps({**body, "digest": _digest(body)}, indent=1) + "\n").encode()


def read(folder: Path) -> dict[str, Any]:
    """Return a checkpoint's manifest.

    Raises NewerFormat for one of a later bigtrain, CheckpointError if it is absent, damaged, of another step than its
    folder is named for, or names a file that does not belong in a checkpoint.
    """
    path = folder / MANIFEST
    if path.is_symlink() or not path.is_file() or path.stat().st_size > MAX_MANIFEST_BYTES:
        raise CheckpointError(f"{folder}: not a complete checkpoint: no {MANIFEST} of a sensible size")
    content = _parsed(path)
    unsafe = [name for name in content["files"] if not _SAFE_NAME.fullmatch(name)]
    if unsafe:
        raise CheckpointError(f"{path}: a file named {unsafe[0]!r} does not belong in a checkpoint")
    if _STEP_FOLDER.fullmatch(folder.name) and content["step"] != step_of(folder):
        raise CheckpointError(f"{path}: damaged: it is of step {content['step']}")
    return content


def _parsed(path: Path) -> dict[str, Any]:
    raw = path.read_bytes()
    try:
        content = strict_json.parse(raw)
    except ValueError as error:
        raise CheckpointError(f"{path}: damaged: not JSON") from error
    if not isinstance(content, dict):
        raise CheckpointError(f"{path}: damaged: not a manifest")
    body = {key: value for key, value in content.items() if key != "digest"}
    if _is_newer(body, content.get("digest")):
        text = f"format {body['format_version']} is newer than this bigtrain reads, which is {FORMAT_VERSION}"
        raise NewerFormat(f"{path}: {text}; update bigtrain, or start a new run folder")
    if _sealed(body) != raw:
        raise CheckpointError(f"{path}: damaged: its digest does not fit its content")
    if not _is_manifest(body):
        raise CheckpointError(f"{path}: damaged: not a manifest of format {FORMAT_VERSION}")
    return content


def _is_newer(body: Mapping[str, Any], digest: object) -> bool:
    """Tell whether a manifest says so; not where all else fits and one flipped bit of ours makes the number."""
    version = body.get("format_version")
    if type(version) is not int or version <= FORMAT_VERSION:
        return False
    ours, theirs = str(FORMAT_VERSION).encode(), str(version).encode()
    changed = int.from_bytes(ours, "big") ^ int.from_bytes(theirs, "big")
    return changed.bit_count() != 1 or _digest({**body, "format_version": FORMAT_VERSION}) != digest


def _is_manifest(body: Mapping[str, Any]) -> bool:
    files, numbers = body.get("files"), (body.get("format_version"), body.get("step"))
    if not all(type(number) is int for number in numbers) or numbers[0] != FORMAT_VERSION:
        return False
    if not isinstance(files, dict):
        return False
    return all(
        isinstance(item, dict) and {key: type(value) for key, value in item.items()} == _FILE_KEYS
        for item in files.values()
    )


def step_folders(run_dir: Path) -> list[Path]:
    """Return the folders of a run that are named as checkpoints, newest first, complete or not."""
    found = [folder for folder in run_dir.glob("step-*") if _STEP_FOLDER.fullmatch(folder.name) and folder.is_dir()]
    return sorted(found, key=step_of, reverse=True)


def step_of(folder: Path) -> int:
    """Return the step that a checkpoint's folder is named for."""
    return int(folder.name.removeprefix("step-"))


def folder_name(step: int) -> str:
    """Return the name of a step's checkpoint."""
    return f"step-{step:08d}"


def _digest(body: Mapping[str, Any]) -> str:
    return hashlib.sha256(json.dumps(body, sort_keys=True).encode()).hexdigest()
