"""What a process does with files below a folder, an operation at a time: a test can count, refuse or stop it."""

from __future__ import annotations

import errno
import io
import os
import signal
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any, NamedTuple

NAMES = ("open", "write", "fsync", "close", "mkdir", "rename", "unlink", "rmdir", "scandir")
"""Of `os`; reading by `io.open` is called "read"."""

CHANGING = ("write", "fsync", "mkdir", "rename", "unlink", "rmdir", "create")
"""What a disk that is full or read-only refuses, whole; "create" is an `open` that makes a file."""


class Operation(NamedTuple):
    """One of them, with its path, and whatever it was called with besides."""

    name: str
    path: str
    arguments: tuple[Any, ...]


Hook = Callable[[Operation, Callable[[], Any]], Any]
"""Gets an operation and what does it; returns what that returns, or does not come back."""


@contextmanager
def watched(root: Path, hook: Hook) -> Iterator[None]:
    """Hand each operation below a folder to a hook, as long as this lasts."""
    inside, plain, plain_open = str(root.resolve()), {name: getattr(os, name) for name in NAMES}, io.open

    def through(name: str) -> Callable[..., Any]:
        def call(*arguments: Any, **options: Any) -> Any:
            path = _path(arguments[0], options.get("dir_fd"))
            if not path.startswith(inside):
                return plain[name](*arguments, **options)
            made = name == "open" and arguments[1] & os.O_CREAT
            operation = Operation("create" if made else name, path, arguments[1:])
            return hook(operation, lambda: plain[name](*arguments, **options))

        return call

    def read(file: Any, *arguments: Any, **options: Any) -> Any:
        path = "" if isinstance(file, int) else _path(file, None)
        if not path.startswith(inside):
            return plain_open(file, *arguments, **options)
        return hook(Operation("read", path, arguments), lambda: plain_open(file, *arguments, **options))

    for name in NAMES:
        setattr(os, name, through(name))
    io.open = read  # type: ignore[assignment]
    try:
        yield
    finally:
        io.open = plain_open
        for name in NAMES:
            setattr(os, name, plain[name])


def _path(where: Any, folder: int | None) -> str:
    """Return where an operation is, given a path, perhaps one in an open folder, or the number of an open file."""
    if isinstance(where, int):
        return str(Path(f"/proc/self/fd/{where}").readlink())
    base = Path() if folder is None else Path(f"/proc/self/fd/{folder}").readlink()
    return str((base / where).absolute())


class KillAt:
    """Kill this process at the so manyth operation: before it, or, of a write, when half of it is done."""

    def __init__(self, number: int, *, half: bool = False) -> None:
        self._left, self._half = number, half

    def __call__(self, operation: Operation, do: Callable[[], Any]) -> Any:
        self._left -= 1
        if self._left >= 0:
            return do()
        if self._half and operation.name == "write":
            data = operation.arguments[0]
            with Path(operation.path).open("ab") as file:
                file.write(bytes(data[: len(data) // 2]))
        os.kill(os.getpid(), signal.SIGKILL)
        raise AssertionError("killed")


class RefuseAt:
    """Refuse the so manyth operation with an error number; with `on`, and all after it that change something."""

    def __init__(self, number: int, error: int, *, on: bool = False) -> None:
        self._left, self._error, self._on = number, error, on
        self.refused = 0

    def __call__(self, operation: Operation, do: Callable[[], Any]) -> Any:
        self._left -= 1
        if self._left == -1 or (self._on and self._left < -1 and self._stays(operation.name)):
            self.refused += 1
            if operation.name == "close":
                do()  # the number is free even so
            where = () if operation.name in ("write", "fsync", "close") else (operation.path,)
            raise OSError(self._error, os.strerror(self._error), *where)
        return do()

    def _stays(self, name: str) -> bool:
        """Tell whether a disk in this state refuses it: a full one still removes files."""
        return name in CHANGING and (self._error in (errno.EROFS, errno.EIO) or name not in ("unlink", "rmdir"))


def in_child(work: Callable[[], None]) -> int:
    """Do something in a fork of this process and return its exit code, negative for a signal."""
    child = os.fork()
    if child == 0:
        code = 1
        try:
            work()
            code = 0
        except BaseException as error:
            os.write(2, f"{type(error).__name__}: {error}\n".encode())
        finally:
            os._exit(code)
    return os.waitstatus_to_exitcode(os.waitpid(child, 0)[1])
