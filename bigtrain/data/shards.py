"""Token shards as one long run of tokens, read by memory map."""

from __future__ import annotations

from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
from numpy.typing import NDArray

Tokens = NDArray[np.unsignedinteger[Any]]


class Shard(NamedTuple):
    """A run of whole documents: token ids, and the documents' bounds, counted from the split's start, both mapped."""

    tokens: Tokens
    offsets: NDArray[np.uint64]


def open_shard(folder: Path, name: str, dtype: str) -> Shard:
    """Map the files `NAME.tokens` and `NAME.offsets` of a folder into memory."""
    offsets = np.asarray(np.memmap(folder / f"{name}.offsets", np.uint64, mode="r"))
    if offsets[0] == offsets[-1]:  # an empty file cannot be mapped
        return Shard(np.empty(0, dtype), offsets)
    return Shard(np.asarray(np.memmap(folder / f"{name}.tokens", dtype, mode="r")), offsets)


class TokenRuns:
    """Reads runs of tokens anywhere in a split. A run must not cross the end of a shard: no document does."""

    def __init__(self, shards: list[Shard]) -> None:
        self._tokens = [shard.tokens for shard in shards if shard.tokens.size]
        starts = [int(shard.offsets[0]) for shard in shards if shard.tokens.size]
        self._starts = np.array(starts, np.int64)

    def read(self, starts: NDArray[np.int64], lengths: NDArray[np.int64]) -> Tokens:
        """Return the runs one after another, (sum(lengths),); `starts` count from the start of the split."""
        shards = np.searchsorted(self._starts, starts, side="right") - 1
        within = starts - self._starts[shards]
        places = zip(shards.tolist(), within.tolist(), (within + lengths).tolist(), strict=True)
        return np.concatenate([self._tokens[shard][start:end] for shard, start, end in places])
