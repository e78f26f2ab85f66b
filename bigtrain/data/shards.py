"""Token shards as one long run of tokens, read by memory map."""

from __future__ import annotations

import mmap
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
from numpy.typing import NDArray

Tokens = NDArray[np.unsignedinteger[Any]]

RELEASE_BYTES = 2**26
"""Read between two releases: the most of a corpus that counts as resident, though the page cache may hold it all."""
PAGES_AROUND_BYTES = 2**16
"""What a fault maps besides the page that was asked for (Linux: `fault_around_bytes`)."""


class Shard(NamedTuple):
    """A run of whole documents: token ids, and the documents' bounds, counted from the split's start, both mapped."""

    tokens: Tokens
    offsets: NDArray[np.uint64]
    mapping: mmap.mmap | None
    """The memory of `tokens`; None where there are none."""


def open_shard(folder: Path, name: str, dtype: str, tokens: Path | None = None) -> Shard:
    """Map the files `NAME.tokens` and `NAME.offsets` of a folder into memory; `tokens` may lie elsewhere.

    Raises ValueError where the bounds are not those of the tokens.
    """
    offsets = np.frombuffer(_mapping(folder / f"{name}.offsets"), np.uint64)
    tokens = tokens or folder / f"{name}.tokens"
    if offsets[0] == offsets[-1] and not tokens.stat().st_size:  # an empty file cannot be mapped
        return Shard(np.empty(0, dtype), offsets, None)
    mapping = _mapping(tokens)
    shard = Shard(np.frombuffer(mapping, dtype), offsets, mapping)
    if int(offsets[-1]) - int(offsets[0]) != len(shard.tokens) or int(offsets[-1]) >= 2**62:
        raise ValueError(f"{name}: {len(shard.tokens)} tokens, of which the offsets say otherwise")
    return shard


class TokenRuns:
    """Reads runs of tokens anywhere in a split. A run must not cross the end of a shard: no document does."""

    def __init__(self, shards: list[Shard]) -> None:
        shards = [shard for shard in shards if shard.tokens.size]
        self._tokens = [shard.tokens for shard in shards]
        self._mappings = [shard.mapping for shard in shards if shard.mapping is not None]
        self._starts = np.array([int(shard.offsets[0]) for shard in shards], np.int64)
        self._unreleased = 0

    def read(self, starts: NDArray[np.int64], lengths: NDArray[np.int64]) -> Tokens:
        """Return the runs one after another, (sum(lengths),); `starts` count from the start of the split.

        Of runs that lie beyond the tokens there is less, which the caller is to notice.
        """
        if not self._tokens:
            return np.empty(0, np.uint16)
        shards = np.searchsorted(self._starts, starts, side="right") - 1
        within = starts - self._starts[shards]
        places = zip(shards.tolist(), within.tolist(), (within + lengths).tolist(), strict=True)
        runs = np.concatenate([self._tokens[shard][start:end] for shard, start, end in places])
        self._count(len(starts) * PAGES_AROUND_BYTES + runs.nbytes)
        return runs

    def _count(self, touched: int) -> None:
        self._unreleased += touched
        if self._unreleased >= RELEASE_BYTES:
            for mapping in self._mappings:
                mapping.madvise(mmap.MADV_DONTNEED)
            self._unreleased = 0


def _mapping(path: Path) -> mmap.mmap:
    with path.open("rb") as file:
        return mmap.mmap(file.fileno(), 0, access=mmap.ACCESS_READ)
