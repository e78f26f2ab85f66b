"""What Linux tells of a running process: whether it computes, waits for a disk, or is stopped. No torch here."""

from __future__ import annotations

import os
from collections.abc import Iterator
from contextlib import suppress
from pathlib import Path
from typing import NamedTuple

PROC = Path("/proc")

STATE, OWN_TICKS, TICKS_OF_ENDED = 0, slice(11, 13), slice(13, 15)
"""Fields of /proc/PID/stat (proc_pid_stat(5)) after the name: what it did itself, and what its ended children did."""


class Activity(NamedTuple):
    """What a process and its descendants do: processor seconds so far, and the state of the process itself."""

    seconds: float
    at_disk: bool
    """A thread is in a sleep that only a device ends: reading, writing, syncing, paging."""
    stopped: bool
    """By SIGSTOP, or a debugger."""


def is_known() -> bool:
    """Tell whether this system tells such things."""
    return (PROC / "self" / "stat").is_file()


def activity(process: int) -> Activity | None:
    """Return what a process does; None for one that has ended."""
    own = _fields(PROC / str(process) / "stat")
    if own is None or own[STATE] in "ZX":
        return None
    ticks = sum(map(int, (*own[OWN_TICKS], *own[TICKS_OF_ENDED])))
    for descendant in _descendants(process):
        fields = _fields(PROC / str(descendant) / "stat")
        ticks += sum(map(int, (*fields[OWN_TICKS], *fields[TICKS_OF_ENDED]))) if fields is not None else 0
    at_disk = any(fields[STATE] == "D" for fields in _threads(process))
    return Activity(ticks / os.sysconf("SC_CLK_TCK"), at_disk, own[STATE] in "Tt")


def waits_in(process: int) -> str:
    """Return the kernel's name for what a process waits in; empty where the system does not tell."""
    with suppress(OSError):
        return (PROC / str(process) / "wchan").read_text().strip("0\n")
    return ""


def _threads(process: int) -> Iterator[list[str]]:
    for path in (PROC / str(process) / "task").glob("*/stat"):
        fields = _fields(path)
        if fields is not None:
            yield fields


def _descendants(process: int) -> list[int]:
    """Return the children of all threads of a process, and theirs."""
    found = [process]
    for one in found:  # grows while it is gone through
        for path in (PROC / str(one) / "task").glob("*/children"):
            with suppress(OSError):
                found += map(int, path.read_text().split())
    return found[1:]


def _fields(path: Path) -> list[str] | None:
    """Return the fields of a process's or a thread's stat file after its name; None once it has ended."""
    try:
        return path.read_text(errors="replace").rpartition(")")[2].split()
    except (OSError, UnicodeError):
        return None
