"""Tensors in a safetensors file, written one after another straight from where they are, with digests on the way.

The format: eight bytes with the header's length (little endian), a JSON header of name -> dtype, shape and offsets,
then the tensors' bytes (huggingface.co/docs/safetensors). The library's own writer first copies everything, and its
reader maps the file, which then counts as resident memory.
"""

from __future__ import annotations

import hashlib
import json
import math
import os
import zlib
from collections.abc import Callable, Iterable, Iterator, Mapping
from contextlib import contextmanager, suppress
from functools import partial
from pathlib import Path
from typing import Any, NamedTuple

import torch
from torch import Tensor

from bigtrain import strict_json
from bigtrain.checkpoint import boxes
from bigtrain.errors import CheckpointError
from bigtrain.sharding.part import Part

DTYPES = {
    torch.float64: "F64", torch.float32: "F32", torch.float16: "F16", torch.bfloat16: "BF16",
    torch.int64: "I64", torch.int32: "I32", torch.int16: "I16", torch.int8: "I8", torch.uint8: "U8", torch.bool: "BOOL",
}  # fmt: skip

OTHER_DTYPES = (
    "F8_E4M3", "F8_E5M2", "F8_E8M0", "F8_E4M3FNUZ", "F8_E5M2FNUZ", "F6_E2M3", "F6_E3M2", "F4", "U16", "U32", "U64",
    "C64",
)  # fmt: skip
"""What else the format knows."""

TORCH_DTYPES = {name: dtype for dtype, name in DTYPES.items()}

CHUNK_BYTES = 16 * 2**20
READ_BYTES = 2**20
"""What a file is digested by: enough to be fast, and little beside the smallest model."""

MAX_HEADER_BYTES, MAX_HEADER_VALUES = 32 * 2**20, 2_500_000
"""200,000 tensors have as much. The library's own bound, 100 MB, takes gigabytes to parse where the JSON is hostile."""

METADATA = "__metadata__"
"""The header's entry for texts by name: here, for each tensor that is a part of a larger one, which part."""


class Digest(NamedTuple):
    """Size and checksums of a file."""

    size: int
    crc32: int
    sha256: str


class TensorEntry(NamedTuple):
    """Where a tensor stands in a file, and what it is; `start` and `size` in bytes.

    `part` says of what it is a part, None of itself. Its shape is another one where numbers are packed.
    """

    dtype: torch.dtype
    shape: torch.Size
    start: int
    size: int
    part: Part | None = None


@contextmanager
def named(path: Path) -> Iterator[None]:
    """Put a path into an OSError that has none: writing and syncing know only the number of an open file."""
    try:
        yield
    except OSError as error:
        if error.errno is None or error.filename is not None:
            raise
        raise OSError(error.errno, os.strerror(error.errno), str(path)) from error


class DigestingFile:
    """A file opened for writing that knows the digest of what was written. What fails is an OSError with its path."""

    def __init__(self, path: Path) -> None:
        self._path = path
        self._file: int | None = os.open(path, os.O_WRONLY | os.O_CREAT | os.O_EXCL | os.O_CLOEXEC, 0o666)
        self._size, self._crc32, self._sha256 = 0, 0, hashlib.sha256()

    def write(self, data: Any) -> None:
        """Write bytes or a flat memory view of bytes."""
        view = memoryview(data)
        for start in range(0, len(view), CHUNK_BYTES):
            chunk = view[start : start + CHUNK_BYTES]
            self._write_all(chunk)
            self._crc32 = zlib.crc32(chunk, self._crc32)
            self._sha256.update(chunk)
        self._size += len(view)

    def _write_all(self, chunk: memoryview) -> None:
        assert self._file is not None
        with named(self._path):
            while chunk:
                chunk = chunk[os.write(self._file, chunk) :]

    def close(self) -> Digest:
        """Bring everything to the disk and return the digest."""
        assert self._file is not None
        with named(self._path):
            os.fsync(self._file)
            self.abandon()
        return Digest(self._size, self._crc32, self._sha256.hexdigest())

    def abandon(self) -> None:
        """Close without a promise; again is nothing."""
        file, self._file = self._file, None
        if file is not None:
            os.close(file)


@contextmanager
def _abandoned_on_error(file: DigestingFile) -> Iterator[DigestingFile]:
    try:
        yield file
    except BaseException:
        with suppress(OSError):  # what went wrong first is told
            file.abandon()
        raise


def write_bytes(path: Path, data: bytes) -> Digest:
    """Write a new file and bring it to the disk. Raises FileExistsError rather than write over one."""
    with _abandoned_on_error(DigestingFile(path)) as file:
        file.write(data)
        return file.close()


def write_tensors(path: Path, tensors: Mapping[str, Tensor], parts: Mapping[str, Part] | None = None) -> Digest:
    """Write tensors to a new safetensors file; one at a time is copied, and none that is contiguous on the CPU.

    `parts` say, by name, which of them are parts of larger tensors.
    """
    texts = {name: boxes.to_text(part) for name, part in (parts or {}).items()}
    outlines = {
        name: Outline(tensor.dtype, tuple(tensor.shape), partial(_itself, tensor)) for name, tensor in tensors.items()
    }
    return write_outlines(path, outlines, texts)


def _itself(tensor: Tensor) -> Tensor:
    return tensor


class Outline(NamedTuple):
    """A tensor that is made when it is written: what it will be, and what makes it."""

    dtype: torch.dtype
    shape: tuple[int, ...]
    make: Callable[[], Tensor]

    @property
    def size(self) -> int:
        """Return its bytes."""
        return math.prod(self.shape) * self.dtype.itemsize


def write_outlines(path: Path, outlines: Mapping[str, Outline], texts: Mapping[str, str]) -> Digest:
    """Write tensors to a new safetensors file, each made when its turn comes and dropped after.

    `texts` are the header's metadata.
    """
    header: dict[str, Any] = {METADATA: dict(texts)} if texts else {}
    end = 0
    for name, outline in outlines.items():
        size = outline.size
        header[name] = {"dtype": DTYPES[outline.dtype], "shape": list(outline.shape), "data_offsets": [end, end + size]}
        end += size
    text = json.dumps(header, separators=(",", ":")).encode()
    text += b" " * (-len(text) % 8)
    _check_header(path, text)
    with _abandoned_on_error(DigestingFile(path)) as file:
        file.write(len(text).to_bytes(8, "little") + text)
        for name, outline in outlines.items():
            _write_tensor(file, name, outline)
        return file.close()


def _write_tensor(file: DigestingFile, name: str, outline: Outline) -> None:
    tensor = outline.make()
    if (tensor.dtype, tuple(tensor.shape)) != (outline.dtype, outline.shape):
        raise ValueError(f"{name}: {tensor.dtype} of {tuple(tensor.shape)}, not as the header says")
    if tensor.numel():
        file.write(_bytes_of(tensor.detach().cpu().contiguous().view(-1).view(torch.uint8)))


def _check_header(path: Path, text: bytes) -> None:
    """Raise CheckpointError for a header that could not be read again."""
    try:
        strict_json.check_values(text.decode(), MAX_HEADER_VALUES)
    except ValueError as error:
        raise CheckpointError(f"{path}: its header holds {error}; use fewer tensors") from None
    if len(text) > MAX_HEADER_BYTES:
        raise CheckpointError(f"{path}: a header of {len(text)} bytes, above {MAX_HEADER_BYTES}; use fewer tensors")


def read_header(path: Path) -> dict[str, TensorEntry]:
    """Return what a safetensors file holds, by name. Raises CheckpointError if the header does not fit the file."""
    size = path.stat().st_size
    with path.open("rb") as file:
        length = int.from_bytes(file.read(8), "little")
        if length > min(size - 8, MAX_HEADER_BYTES):
            raise CheckpointError(f"{path}: damaged: a header of {length} bytes in a file of {size}")
        try:
            header = strict_json.parse(file.read(length), MAX_HEADER_VALUES)
            parts = {name: boxes.from_text(text) for name, text in header.pop(METADATA, {}).items() if name in header}
            other = next(
                ((name, item["dtype"]) for name, item in header.items() if item["dtype"] in OTHER_DTYPES), None
            )
            known = header if other is None else {}
            entries = {name: _entry(item, 8 + length, parts.get(name)) for name, item in known.items()}
        except (ValueError, KeyError, TypeError, AttributeError) as error:
            raise CheckpointError(f"{path}: damaged: its header is not one of safetensors") from error
    if other is not None:
        raise CheckpointError(f"{path}: {other[0]} is of type {other[1]}; convert it to F32, BF16 or F16")
    end = 8 + length
    for entry in sorted(entries.values(), key=lambda entry: (entry.start, entry.size)):
        if entry.start != end:
            raise CheckpointError(f"{path}: damaged: its tensors overlap, or leave gaps")
        end += entry.size
    if end != size:
        raise CheckpointError(f"{path}: damaged: {size} bytes, and its header says {end}")
    return entries


def _entry(item: Mapping[str, Any], base: int, part: Part | None) -> TensorEntry:
    dtype, shape, (start, end) = TORCH_DTYPES[item["dtype"]], item["shape"], item["data_offsets"]
    if any(type(number) is not int or number < 0 for number in (*shape, start, end)):
        raise ValueError(f"{item}: sizes and offsets are whole numbers from 0")
    if end - start != math.prod(shape) * dtype.itemsize or max(shape, default=0) >= 2**62:
        raise ValueError(f"{item}: offsets do not fit the shape")
    return TensorEntry(dtype, torch.Size(shape), base + start, end - start, part)


def read_tensors(path: Path) -> Iterator[tuple[str, Tensor]]:
    """Yield the names and tensors of a safetensors file, one at a time, each in host memory of its own."""
    for name, entry in read_header(path).items():
        tensor = torch.empty(entry.shape, dtype=entry.dtype)
        read_runs(path, entry, [boxes.Run(0, 0, tensor.numel())], tensor)
        yield name, tensor


def read_runs(path: Path, entry: TensorEntry, runs: Iterable[boxes.Run], into: Tensor) -> None:
    """Read runs of a tensor's elements into a contiguous tensor of its dtype on the CPU, and nothing else of it.

    Raises CheckpointError where the file ends before.
    """
    wanted, width = [run for run in runs if run.length], entry.dtype.itemsize
    if not wanted:
        return
    memory = _bytes_of(into.view(-1).view(torch.uint8))
    with path.open("rb") as file:
        for run in wanted:
            file.seek(entry.start + run.source * width)
            if file.readinto(memory[run.target * width : (run.target + run.length) * width]) != run.length * width:
                raise CheckpointError(f"{path}: damaged: it ends before its tensors do")


def _bytes_of(flat: Tensor) -> memoryview:
    """Return the memory of a flat byte tensor on the CPU."""
    buffer: Any = flat.numpy()
    return memoryview(buffer)


def digest(path: Path) -> Digest:
    """Return the size and checksums of a file as it is on the disk."""
    size, crc32, sha256 = 0, 0, hashlib.sha256()
    buffer = memoryview(bytearray(READ_BYTES))
    with path.open("rb") as file:
        while count := file.readinto(buffer):
            chunk = buffer[:count]
            size += count
            crc32 = zlib.crc32(chunk, crc32)
            sha256.update(chunk)
    return Digest(size, crc32, sha256.hexdigest())
