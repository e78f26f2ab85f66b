"""The tensors of a checkpoint, from however many files they are in: whole ones, or any part of them."""

from __future__ import annotations

import math
import re
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import NamedTuple

import torch
from torch import Tensor

from bigtrain.checkpoint import manifest, tensors
from bigtrain.checkpoint.boxes import Run, runs
from bigtrain.checkpoint.tensors import TensorEntry
from bigtrain.errors import CheckpointError
from bigtrain.sharding.part import Part, Shape


def file_name(name: str, shard: int, shards: int) -> str:
    """Return the name of a shard's file, where the file of all would have this name."""
    path = Path(name)
    return name if shards == 1 else f"{path.stem}-{shard:05d}-of-{shards:05d}{path.suffix}"


class Source(NamedTuple):
    """A file that has some of what is wanted of a tensor: its entries, its part of the tensor, and what to copy."""

    path: Path
    entries: Mapping[str, TensorEntry]
    part: Part
    runs: tuple[Run, ...]


class StoredTensors:
    """What a verified checkpoint holds in the file of a name, or in the files of its shards.

    Each file says of each of its tensors which part it is of what, so there is no table that grows with the ranks; only
    headers that are needed are read, once. Raises CheckpointError where the checkpoint has no such file.
    """

    def __init__(self, folder: Path, name: str) -> None:
        self.folder = folder
        stem, suffix = re.escape(Path(name).stem), re.escape(Path(name).suffix)
        pattern = re.compile(rf"{stem}(-\d+-of-\d+)?{suffix}")
        self.files = sorted(folder / name for name in manifest.read(folder)["files"] if pattern.fullmatch(name))
        if not self.files:
            raise CheckpointError(f"{folder}: holds no {name}; it is not a checkpoint of a run")
        self._headers: dict[int, dict[str, TensorEntry]] = {}

    @property
    def entries(self) -> Mapping[str, TensorEntry]:
        """Return what the first file holds: it has a part, perhaps an empty one, of every tensor."""
        return self._header(0)

    def shape(self, name: str) -> Shape:
        """Return the shape of a whole tensor."""
        entry = self.entries[name]
        return tuple(entry.shape) if entry.part is None else entry.part.whole

    def read(self, name: str, part: Part) -> Tensor:
        """Return a part of a tensor in host memory of its own. Raises CheckpointError where it is not all there."""
        found = torch.empty(part.shape, dtype=self.entries[name].dtype)
        for source in self.sources(name, part):
            entry = source.entries[name]
            if (entry.dtype, tuple(entry.shape)) != (found.dtype, source.part.shape):
                raise CheckpointError(f"{source.path}: {name} is {entry.dtype} of shape {tuple(entry.shape)} there")
            tensors.read_runs(source.path, entry, source.runs, found)
        return found

    def whole(self) -> Iterator[tuple[str, Tensor]]:
        """Yield the names and tensors, whole, one at a time."""
        for name in self.entries:
            yield name, self.read(name, Part.of_whole(self.shape(name)))

    def sources(self, name: str, part: Part) -> list[Source]:
        """Return where a part of a tensor is to be found. Raises CheckpointError where it is not all there."""
        found: list[Source] = []
        missing = math.prod(part.shape)
        for index in _outward(self._likely(part), len(self.files)):
            if not missing:
                break
            entry = self._header(index).get(name)
            if entry is None:
                continue
            kept = entry.part or Part.of_whole(part.whole)
            if kept.whole != part.whole:
                raise CheckpointError(f"{self.files[index]}: {name} is of shape {kept.whole}, not {part.whole}")
            common = tuple(runs(kept, part))
            if common:
                found.append(Source(self.files[index], self._header(index), kept, common))
                missing -= sum(run.length for run in common)
        if missing:
            raise CheckpointError(f"{self.folder}: {missing} elements of {name} are in none of its files")
        return found

    def _likely(self, part: Part) -> int:
        """Return the file that has the first row of a part, if all have as many rows, rounded up."""
        rows = part.whole[0] if part.whole else 0
        return min(part.start[0] // -(-rows // len(self.files)), len(self.files) - 1) if rows else 0

    def _header(self, index: int) -> dict[str, TensorEntry]:
        if index not in self._headers:
            self._headers[index] = tensors.read_header(self.files[index])
        return self._headers[index]


def _outward(start: int, count: int) -> Iterator[int]:
    """Yield the numbers below `count`, those nearest to `start` first, upward before downward."""
    yield start
    for distance in range(1, count):
        yield from (index for index in (start + distance, start - distance) if 0 <= index < count)
