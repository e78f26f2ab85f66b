"""A checkpoint's manifest: what belongs to it, with digests, itself digested: any changed byte is found. No torch."""

from __future__ import annotations

import hashlib
import json
import re
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from bigtrain.errors import CheckpointError

MANIFEST = "manifest.json"
FORMAT_VERSION = 1
MAX_MANIFEST_BYTES = 16 * 2**20

_SAFE_NAME = re.compile(r"[a-z0-9][a-z0-9._-]*")
_STEP_FOLDER = re.compile(r"step-(\d{8,})")


def encode(content: Mapping[str, Any]) -> bytes:
    """Return a manifest's bytes: its content and the SHA-256 of that content's canonical form."""
    body = {"format_version": FORMAT_VERSION, **content}
    return (json.dumps({**body, "digest": _digest(body)}, indent=1) + "\n").encode()


def read(folder: Path) -> dict[str, Any]:
    """Return a checkpoint's manifest. Raises CheckpointError if it is absent, damaged or of a newer format."""
    path = folder / MANIFEST
    if not path.is_file() or path.stat().st_size > MAX_MANIFEST_BYTES:
        raise CheckpointError(f"{folder}: not a complete checkpoint: no {MANIFEST} of a sensible size")
    raw = path.read_bytes()
    try:
        content = json.loads(raw)
    except ValueError as error:
        raise CheckpointError(f"{path}: damaged: not JSON") from error
    if not isinstance(content, dict) or encode({k: v for k, v in content.items() if k != "digest"}) != raw:
        if isinstance(content, dict) and str(content.get("format_version", "")) > str(FORMAT_VERSION):
            raise CheckpointError(f"{path}: format {content['format_version']} is newer than this bigtrain reads")
        raise CheckpointError(f"{path}: damaged: its digest does not fit its content")
    unsafe = [name for name in content["files"] if not _SAFE_NAME.fullmatch(name)]
    if unsafe:
        raise CheckpointError(f"{path}: a file named {unsafe[0]!r} does not belong in a checkpoint")
    return content


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
