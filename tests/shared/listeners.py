"""The TCP sockets on which a process and those that it started listen, from /proc."""

from __future__ import annotations

import ipaddress
from collections.abc import Iterator
from pathlib import Path

LISTENS = "0A"


def of_tree(root: int) -> set[tuple[str, int]]:
    """Return address and port of every socket on which one of these processes listens."""
    held = {inode for process in tree(root) for inode in _sockets(process)}
    return {place for inode, place in _listening() if inode in held}


def tree(root: int) -> set[int]:
    """Return a process and all that descend from it."""
    parents = dict(_parents())
    found, size = {root}, 0
    while size < len(found):
        size = len(found)
        found |= {process for process, parent in parents.items() if parent in found}
    return found


def is_loopback(address: str) -> bool:
    found = ipaddress.ip_address(address)
    inner = getattr(found, "ipv4_mapped", None)
    return (inner or found).is_loopback


def _parents() -> Iterator[tuple[int, int]]:
    for status in Path("/proc").glob("[0-9]*/stat"):
        try:
            yield int(status.parent.name), int(status.read_text().rpartition(")")[2].split()[1])
        except OSError:
            continue


def _sockets(process: int) -> Iterator[str]:
    try:
        for link in Path(f"/proc/{process}/fd").iterdir():
            target = str(link.readlink())
            if target.startswith("socket:["):
                yield target[8:-1]
    except OSError:
        return


def _listening() -> Iterator[tuple[str, tuple[str, int]]]:
    for table in ("tcp", "tcp6"):
        for line in Path("/proc/net", table).read_text().splitlines()[1:]:
            fields = line.split()
            if fields[3] == LISTENS:
                address, port = fields[1].split(":")
                yield fields[9], (_address(address), int(port, 16))


def _address(text: str) -> str:
    words = (bytes.fromhex(text[start : start + 8])[::-1] for start in range(0, len(text), 8))
    return str(ipaddress.ip_address(b"".join(words)))
