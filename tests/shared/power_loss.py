"""What can be on a disk after the power is lost: of what was not synced, any part.

Operations are recorded as they are done. Of a file's bytes those are safe that were written before its last sync; of
the names in a folder those that were given or taken before the folder's last sync. Anything later may be there or not,
in any combination: POSIX promises no order (`fsync(2)`).
"""

from __future__ import annotations

import itertools
import random
from collections.abc import Callable
from pathlib import Path
from typing import Any, NamedTuple

from disk import Operation

Node = bytes | dict[str, int]
"""A file's bytes, or the names in a folder, each with the number of what it names."""

ROOT = 0


class Step(NamedTuple):
    """One change of the node of a number, or its sync: what it does to a file's bytes or a folder's names."""

    node: int
    kind: str
    do: Callable[[Any, random.Random | None], Any]


class Recorder:
    """A hook for `disk.watched` that does everything and writes down what changes."""

    def __init__(self, root: Path) -> None:
        self.root, self.steps = root.resolve(), list[Step]()
        self._numbers = itertools.count(ROOT)
        self._first: dict[int, Node] = {}
        self._read(self.root)
        self._now = {number: node if isinstance(node, bytes) else dict(node) for number, node in self._first.items()}

    def _read(self, path: Path) -> int:
        number = next(self._numbers)
        if path.is_dir():
            self._first[number] = {}
            self._first[number] = {child.name: self._read(child) for child in path.iterdir()}
        else:
            self._first[number] = path.read_bytes()
        return number

    def __call__(self, operation: Operation, do: Callable[[], Any]) -> Any:
        found = do()
        name, path = operation.name, operation.path
        own = Path(path).name
        folder = ROOT if path == str(self.root) else self._node(str(Path(path).parent))
        if name in ("create", "mkdir"):
            number = next(self._numbers)
            self._now[number] = {} if name == "mkdir" else b""
            self._first[number] = {} if name == "mkdir" else b""
            self._did(Step(folder, "name", lambda names, _: {**names, own: number}))
        elif name in ("unlink", "rmdir"):
            self._did(Step(folder, "unname", lambda names, _: {k: v for k, v in names.items() if k != own}))
        elif name == "rename":
            number, new = self._node(path), Path(operation.arguments[0]).name
            self._did(Step(folder, "move", lambda n, _: {**{k: v for k, v in n.items() if k != own}, new: number}))
        elif name == "write":
            self._did(_writing(self._node(path), bytes(operation.arguments[0])[:found], self._now))
        elif name == "fsync":
            self.steps.append(Step(self._node(path), "sync", lambda node, _: node))
        return found

    def _node(self, path: str) -> int:
        number = ROOT
        for part in Path(path).relative_to(self.root).parts:
            names = self._now[number]
            assert isinstance(names, dict)
            number = names[part]
        return number

    def _did(self, step: Step) -> None:
        self.steps.append(step)
        self._now[step.node] = step.do(self._now[step.node], None)

    def published(self, name: str) -> int:
        """Return how many steps there are until a name in the root has been given and synced."""
        seen = self._first[ROOT]
        named = False
        for place, step in enumerate(self.steps):
            if step.node == ROOT:
                seen = step.do(seen, None)
                named = named or name in seen
                if named and step.kind == "sync":
                    return place + 1
        raise AssertionError(f"{name} was not published")

    def after_loss(self, done: int, chance: float, luck: random.Random) -> dict[int, Node]:
        """Return what is on the disk if the power is lost after so many steps.

        Each that was not synced by then is there by that chance; of bytes that are not, their number may be.
        """
        synced = {step.node: place for place, step in enumerate(self.steps[:done]) if step.kind == "sync"}
        disk = dict(self._first)
        for place, step in enumerate(self.steps[:done]):
            if synced.get(step.node, -1) > place or luck.random() < chance:
                disk[step.node] = step.do(disk[step.node], None)
            elif step.kind == "write":
                disk[step.node] = step.do(disk[step.node], luck)
        return disk


def _writing(number: int, data: bytes, now: dict[int, Node]) -> Step:
    start = len(now[number])

    def write(before: bytes, luck: random.Random | None) -> bytes:
        """Return a file's bytes; with luck, what is left of those that got lost: none, zeros, or some and zeros."""
        written = data
        if luck is not None:
            kept = luck.choice((None, 0, len(data) // 2))
            if kept is None:
                return before
            written = data[:kept].ljust(len(data), b"\0")
        return before[:start].ljust(start, b"\0") + written + before[start + len(data) :]

    return Step(number, "write", write)


def make(disk: dict[int, Node], folder: Path, number: int = ROOT) -> None:
    """Make a folder with what is on a disk."""
    names = disk[number]
    assert isinstance(names, dict)
    folder.mkdir()
    for name, child in names.items():
        node = disk[child]
        if isinstance(node, bytes):
            (folder / name).write_bytes(node)
        else:
            make(disk, folder / name, child)


def tree(disk: dict[int, Node], number: int = ROOT) -> Any:
    """Return what is on a disk in a form that can be compared: a tree of names."""
    node = disk[number]
    return node if isinstance(node, bytes) else tuple(sorted((name, tree(disk, child)) for name, child in node.items()))
