"""A .json file value by value: an array of objects or objects one after another, of which one is held at a time."""

from __future__ import annotations

import json
import re
from collections.abc import Iterable, Iterator
from pathlib import Path

from bigtrain import strict_json
from bigtrain.data.decoding import CHUNK_BYTES, LARGEST_LINE, data_error
from bigtrain.errors import DataError

_NOT_SPACE = re.compile(r"\S")


def json_values(path: Path, texts: Iterable[str]) -> Iterator[tuple[int, object]]:
    """Yield the line on which each value begins, and the value; raises DataError with the line of what is broken."""
    stream = _Stream(path, iter(texts))
    if stream.next_mark() == "[":
        yield from _array(stream)
    while stream.next_mark():
        yield stream.line, stream.value()


def _array(stream: _Stream) -> Iterator[tuple[int, object]]:
    stream.skip()
    mark = stream.next_mark()
    while mark != "]":
        yield stream.line, stream.value()
        mark = stream.next_mark()
        if mark not in ("]", ","):
            raise stream.broken("',' or ']' is missing")
        if mark == ",":
            stream.skip()
            mark = stream.next_mark()
    stream.skip()
    if stream.next_mark():
        raise stream.broken("more text after the array")


class _Stream:
    def __init__(self, path: Path, texts: Iterator[str]) -> None:
        self.path, self.texts = path, texts
        self.buffer, self.at, self.line = "", 0, 1
        self.decoder = json.JSONDecoder()

    def next_mark(self) -> str:
        """Return the next character that is no white space, without going past it; empty at the end."""
        while True:
            match = _NOT_SPACE.search(self.buffer, self.at)
            self._advance(match.start() if match else len(self.buffer))
            if match:
                return match[0]
            if not self._more(1):
                return ""

    def skip(self) -> None:
        """Go past one character."""
        self._advance(self.at + 1)

    def value(self) -> object:
        """Return the value that begins here and go past it, reading on while it is not whole."""
        while True:
            try:
                value, end = self.decoder.raw_decode(self.buffer, self.at)
            except json.JSONDecodeError as error:
                held = len(self.buffer) - self.at
                self._check_values(error.pos)
                # Doubling what is held keeps the work linear in the size of the value.
                if held <= LARGEST_LINE and self._more(max(held, CHUNK_BYTES)):
                    continue
                self.line += self.buffer.count("\n", self.at, error.pos)
                raise self.broken(error.msg) from None
            except RecursionError:
                raise self.broken("nested too deeply") from None
            except ValueError as error:  # too many values, or more digits than Python reads of an integer
                reason = "a number of too many digits" if "digits" in str(error) else str(error)
                raise self.broken(reason) from None
            self._advance(end)
            return value

    def _check_values(self, end: int) -> None:
        """Raise DataError where what has been read of one value, as far as this place, holds too many others."""
        try:
            strict_json.check_values(self.buffer[self.at : end])
        except ValueError as error:
            raise self.broken(str(error)) from None

    def broken(self, reason: str) -> DataError:
        """Return the error that names this line."""
        return data_error(f"{self.path}:{self.line}", f"broken JSON: {reason}; mend the file there")

    def _advance(self, end: int) -> None:
        self.line += self.buffer.count("\n", self.at, end)
        self.at = end

    def _more(self, wanted: int) -> bool:
        pieces, got = [self.buffer[self.at :]], 0
        for text in self.texts:
            pieces.append(text)
            got += len(text)
            if got >= wanted:
                break
        self.buffer, self.at = "".join(pieces), 0
        return got > 0
