"""Where tokenized data is kept: the folder, its fingerprints, locks, and files that appear whole or not at all."""

from __future__ import annotations

import fcntl
import hashlib
import json
import os
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path
from typing import IO, Any

from bigtrain.config.schema import DataSection
from bigtrain.errors import DataError, Fault


def cache_folder(data: DataSection) -> Path:
    """Return `data.cache`, else `$BIGTRAIN_CACHE`, else `bigtrain` in the user's cache folder."""
    chosen = data.cache or os.environ.get("BIGTRAIN_CACHE")
    if chosen:
        return Path(chosen).expanduser().absolute()
    home = os.environ.get("XDG_CACHE_HOME")
    return (Path(home) if home else Path.home() / ".cache") / "bigtrain"


def fingerprint(facts: Mapping[str, Any]) -> str:
    """Return 24 hex digits that change when any of these facts does; facts are JSON values."""
    return hashlib.sha256(json.dumps(facts, sort_keys=True).encode()).hexdigest()[:24]


def file_digest(path: Path) -> str:
    """Return the SHA-256 of a file as hex digits, read in constant memory."""
    with path.open("rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()


@contextmanager
def locked(path: Path) -> Iterator[None]:
    """Hold an exclusive lock, waiting for whoever holds it; it ends with the process, however that ends.

    `path` is a file of its own, left behind: removing a lock file while another process waits for it would let
    two in.
    """
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        file = path.open("ab")
    except OSError as error:
        text = f"{path.parent}: cannot be written ({error.strerror}); name another folder, or set BIGTRAIN_CACHE"
        raise DataError(Fault("", "data.cache", text)) from error
    with file:
        fcntl.flock(file, fcntl.LOCK_EX)
        yield


@contextmanager
def written_aside(path: Path) -> Iterator[IO[bytes]]:
    """Open a file that takes the place of `path` when the block ends well, and never half-written."""
    path.parent.mkdir(parents=True, exist_ok=True)
    aside = path.with_name(f"{path.name}.{os.getpid()}.aside")
    try:
        with aside.open("wb") as file:
            yield file
            synced(file)
        aside.replace(path)
    finally:
        aside.unlink(missing_ok=True)


def write_json(path: Path, value: object) -> None:
    """Write a value as sorted, indented JSON, in one piece."""
    with written_aside(path) as file:
        file.write(json.dumps(value, indent=2, sort_keys=True).encode() + b"\n")


def synced(file: IO[bytes]) -> None:
    """Bring what was written to the disk before anything says that it is there."""
    file.flush()
    os.fsync(file.fileno())
