"""A folder that is there whole or not at all: written aside, brought to the disk, renamed."""

from __future__ import annotations

import errno
import fcntl
import glob
import os
import shutil
import uuid
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

from bigtrain.checkpoint.folders import sync_folder
from bigtrain.checkpoint.space import free_bytes
from bigtrain.errors import BigtrainError, Fault, InputError
from bigtrain.units import format_bytes

SUFFIX = ".partial"

_SPACE = dict.fromkeys((errno.ENOSPC, errno.EDQUOT), "free some space there, or name another folder")
_OTHER = (errno.EROFS, errno.EIO, errno.EBUSY, errno.EACCES, errno.EPERM, errno.ENOTEMPTY, errno.EEXIST, errno.EXDEV)
REMEDIES = {**_SPACE, **dict.fromkeys(_OTHER, "see to it that it can be used, or name another folder")}
"""What to do where the disk refuses to read, write or rename, by the number of the error."""


@contextmanager
def new_folder(out: Path, needed_bytes: int) -> Iterator[Path]:
    """Give an empty folder to write in, which becomes `out` at the end; after an error nothing of it is left.

    What a process that was killed left behind goes the next time. Raises InputError where `out` is in use or the disk
    has no room for so many bytes, BigtrainError where the disk takes no more or refuses.
    """
    out = Path(os.path.realpath(out.expanduser()))
    check_unused(out)
    free = free_bytes(out)
    if free is not None and free < needed_bytes:
        text = f"{format_bytes(needed_bytes)} are needed and {format_bytes(free)} free; name a folder on another disk"
        raise _fault(out, text)
    try:
        out.parent.mkdir(parents=True, exist_ok=True)
        _remove_debris(out)
        aside = out.with_name(f".{out.name}.{uuid.uuid4().hex[:8]}{SUFFIX}")
        aside.mkdir()
    except OSError as error:
        raise _fault(out, f"{error.strerror}; name another folder") from error
    with _held(aside):
        try:
            yield aside
            _publish(aside, out)
        except OSError as error:
            if error.errno not in REMEDIES:
                raise
            place = error.filename2 or error.filename or out
            raise BigtrainError(f"{place}: {error.strerror}; {REMEDIES[error.errno]}") from error
        finally:
            shutil.rmtree(aside, ignore_errors=True)


def check_unused(out: Path) -> None:
    """Raise InputError if a folder cannot be made there: something is, other than an empty folder."""
    try:
        if not os.path.lexists(out) or (out.is_dir() and not any(out.iterdir())):
            return
    except OSError as error:
        raise _fault(out, f"{error.strerror}; name another folder") from error
    raise _fault(out, f"exists and is not {'empty' if out.is_dir() else 'a folder'}; name another folder")


def _fault(out: Path, text: str) -> InputError:
    return InputError(Fault("command line", "OUT", f"{out}: {text}"))


def _publish(aside: Path, out: Path) -> None:
    sync_folder(aside)
    check_unused(out)
    aside.rename(out)
    sync_folder(out.parent)


@contextmanager
def _held(aside: Path) -> Iterator[None]:
    """Lock a folder, as far as its file system can, so that nobody takes it for debris."""
    handle = os.open(aside, os.O_RDONLY)
    try:
        _lock(handle)
        yield
    finally:
        os.close(handle)


def _lock(handle: int) -> bool:
    try:
        fcntl.flock(handle, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except OSError:
        return False
    return True


def _remove_debris(out: Path) -> None:
    for found in out.parent.glob(f".{glob.escape(out.name)}.*{SUFFIX}"):
        handle = os.open(found, os.O_RDONLY)
        try:
            if _lock(handle):
                shutil.rmtree(found, ignore_errors=True)
        finally:
            os.close(handle)
