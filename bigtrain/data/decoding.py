"""A file's bytes as text, in constant memory: decompressed, decoded, cut into lines, with exact places of faults."""

from __future__ import annotations

import codecs
import gzip
import zlib
from collections.abc import Iterable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import IO, Any

from bigtrain.config.paths import COMPRESSED_SUFFIXES
from bigtrain.errors import DataError, Fault

CHUNK_BYTES = 2**20
LARGEST_LINE = 2**24
"""Characters of a line, or of a value in it; a file with a larger one is taken for broken, not read to its end."""
COMPRESSIONS = COMPRESSED_SUFFIXES


@dataclass
class Meter:
    """How much of the source's bytes was read: finished files, and the place in the present one."""

    finished_bytes: int = 0
    present_bytes: int = 0

    @property
    def read_bytes(self) -> int:
        """Return the bytes read so far, as they lie on the disk."""
        return self.finished_bytes + self.present_bytes


def data_error(where: str, text: str, key: str = "data.source") -> DataError:
    """Return an error of one fault."""
    return DataError(Fault(where, key, text))


def byte_chunks(path: Path, meter: Meter) -> Iterator[bytes]:
    """Yield the decompressed bytes of a file; raises DataError when it cannot be read or decompressed."""
    try:
        with path.open("rb") as raw:
            file = _decompressed(path, raw)
            while chunk := file.read(CHUNK_BYTES):
                meter.present_bytes = raw.tell()
                yield chunk
    except (OSError, EOFError, zlib.error) as error:
        reason = getattr(error, "strerror", None) or str(error).splitlines()[0]
        instead = "make it readable" if getattr(error, "strerror", None) else "fetch or compress it again"
        raise data_error(str(path), f"cannot be read: {reason}; {instead}") from error


def decoded(path: Path, chunks: Iterable[bytes]) -> Iterator[str]:
    """Yield UTF-8 text without a byte order mark; raises DataError with the offset of the first wrong byte.

    The offset counts in the decompressed bytes.
    """
    decoder = codecs.getincrementaldecoder("utf-8")()
    consumed = 0
    for chunk in _then_nothing(chunks):
        waiting = len(decoder.getstate()[0])
        try:
            text = decoder.decode(chunk, final=not chunk)
        except UnicodeDecodeError as error:
            offset, value = consumed - waiting + error.start, error.object[error.start]
            what = f"not UTF-8 text: byte 0x{value:02x} at offset {offset}; save the file as UTF-8"
            raise data_error(str(path), what) from None
        yield text if consumed else text.removeprefix("\ufeff")
        consumed += len(chunk)


def lines(path: Path, texts: Iterable[str]) -> Iterator[str]:
    """Yield the lines of a text that comes in pieces, each with its line feed.

    Raises DataError for a line of more than `LARGEST_LINE` characters.
    """
    begun: list[str] = []
    number = 1
    for text in texts:
        first, *others = text.split("\n")
        begun.append(first)
        if sum(map(len, begun)) > LARGEST_LINE:
            raise data_error(f"{path}:{number}", f"a line of more than {LARGEST_LINE:,} characters; break it up")
        number += len(others)
        if others:
            yield "".join(begun) + "\n"
            yield from (line + "\n" for line in others[:-1])
            begun = [others[-1]]
    if last := "".join(begun):
        yield last


def _decompressed(path: Path, raw: IO[bytes]) -> Any:
    if path.suffix.lower() == ".gz":
        return gzip.GzipFile(fileobj=raw)
    if path.suffix.lower() == ".zst":
        import pyarrow

        # pyarrow reads Zstandard, so that no other package is needed for it.
        return pyarrow.CompressedInputStream(pyarrow.PythonFile(raw, mode="r"), "zstd")
    return raw


def _then_nothing(chunks: Iterable[bytes]) -> Iterator[bytes]:
    yield from chunks
    yield b""
