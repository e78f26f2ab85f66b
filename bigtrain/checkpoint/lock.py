"""A run folder belongs to one run at a time: a lock that names who has it. No torch."""

from __future__ import annotations

import errno
import fcntl
import os
import platform
import stat
import sys
import time
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

from bigtrain.errors import ResumeError

LOCK_FILE = ".lock"

LONGEST_NAME = 300
"""Bytes of the holder's name that are shown."""

PATIENCE_SECONDS = 5.0
"""A process that was killed may hold its files for a while: until its memory has been given back."""

NO_LOCKS = (errno.ENOSYS, errno.EOPNOTSUPP, errno.ENOLCK)
"""What file systems answer that know no locks, such as Lustre mounted without `flock`."""


@contextmanager
def only_user_of(run_dir: Path) -> Iterator[None]:
    """Hold a run folder for this process; the hold ends with the process, however that ends.

    Raises ResumeError if another process holds it, naming that.
    """
    with _opened(run_dir, os.O_CREAT) as file:
        if not _locked(file, run_dir, fcntl.LOCK_EX):
            text = f"warning: {run_dir}: its file system knows no locks; see to it that one launch uses it at a time"
            print(text, file=sys.stderr)
        os.ftruncate(file, 0)
        os.pwrite(file, f"process {os.getpid()} on {platform.node()}".encode(), 0)
        yield


def check_unused(run_dir: Path) -> None:
    """Raise ResumeError if a process holds a run folder, naming that; nothing is written or held any longer."""
    if (run_dir / LOCK_FILE).exists():
        with _opened(run_dir) as file:
            _locked(file, run_dir, fcntl.LOCK_SH)


@contextmanager
def _opened(run_dir: Path, flags: int = 0) -> Iterator[int]:
    """Give the number of the lock file. Raises ResumeError for what is no plain file: a link leads elsewhere."""
    path = run_dir / LOCK_FILE
    try:
        file = os.open(path, os.O_RDWR | os.O_NOFOLLOW | os.O_NONBLOCK | flags, 0o666)
    except OSError as error:
        raise ResumeError(f"{path}: {error.strerror}; make the folder writable, or delete what is there") from error
    try:
        if not stat.S_ISREG(os.fstat(file).st_mode):
            raise ResumeError(f"{path}: not a plain file; delete it")
        yield file
    finally:
        os.close(file)


def _locked(file: int, run_dir: Path, how: int) -> bool:
    """Lock an open file; False where its file system knows no locks. Raises ResumeError if another process keeps it."""
    end = time.monotonic() + PATIENCE_SECONDS
    while True:
        try:
            fcntl.flock(file, how | fcntl.LOCK_NB)
            return True
        except BlockingIOError:
            if time.monotonic() >= end:
                text = f"in use by {_holder(file)}; wait for it, or stop it, or name another --run-dir"
                raise ResumeError(f"{run_dir}: {text}") from None
            time.sleep(0.05)
        except OSError as error:
            if error.errno in NO_LOCKS:
                return False
            raise


def _holder(file: int) -> str:
    text = os.pread(file, LONGEST_NAME, 0).decode(errors="replace")
    return "".join(letter for letter in text if letter.isprintable()) or "another process"
