from __future__ import annotations

import sys
from pathlib import Path

import numpy as np
import psutil
import pytest

from bigtrain.data import shards
from bigtrain.data.shards import TokenRuns, open_shard


def write(folder: Path, name: str, start: int, documents: list[list[int]], dtype: str = "uint16") -> None:
    tokens = np.array([token for document in documents for token in document], dtype)
    tokens.tofile(folder / f"{name}.tokens")
    offsets = start + np.cumsum([0, *map(len, documents)])
    offsets.astype(np.uint64).tofile(folder / f"{name}.offsets")


@pytest.mark.parametrize("dtype", ["uint16", "uint32"])
def test_open_shard(tmp_path: Path, dtype: str) -> None:
    write(tmp_path, "train-00000", 100, [[1, 2], [60_000]], dtype)
    shard = open_shard(tmp_path, "train-00000", dtype)
    assert shard.tokens.tolist() == [1, 2, 60_000]
    assert shard.offsets.tolist() == [100, 102, 103]
    assert shard.tokens.dtype == dtype
    assert not shard.tokens.flags.writeable


def test_empty_shard(tmp_path: Path) -> None:
    write(tmp_path, "validation-00000", 7, [])
    shard = open_shard(tmp_path, "validation-00000", "uint16")
    assert len(shard.tokens) == 0
    assert shard.offsets.tolist() == [7]


def test_runs_across_shards(tmp_path: Path) -> None:
    write(tmp_path, "a", 0, [[0, 1, 2], [3, 4]])
    write(tmp_path, "b", 5, [])
    write(tmp_path, "c", 5, [[5, 6], [7]])
    runs = TokenRuns([open_shard(tmp_path, name, "uint16") for name in "abc"])
    assert runs.read(np.array([0, 3, 5, 7]), np.array([3, 2, 2, 1])).tolist() == list(range(8))
    assert runs.read(np.array([6, 1, 4]), np.array([1, 2, 1])).tolist() == [6, 1, 2, 4]
    assert runs.read(np.array([2, 2]), np.array([1, 1])).tolist() == [2, 2]


def resident_bytes(path: Path) -> int:
    process = psutil.Process()
    return sum(part.rss for part in process.memory_maps(grouped=True) if part.path == str(path))


@pytest.mark.skipif(sys.platform != "linux", reason="memory maps are read from /proc")
def test_what_was_read_does_not_stay_resident(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    count = 2**21
    write(tmp_path, "a", 0, [list(range(1000)) * (count // 1000)])
    runs = TokenRuns([open_shard(tmp_path, "a", "uint16")])
    starts = np.arange(0, count - 2000, 1000)
    lengths = np.full_like(starts, 1000)
    runs.read(starts, lengths)
    assert resident_bytes(tmp_path / "a.tokens") < 2 * 2**16  # over 64 MiB were counted, so all was released
    monkeypatch.setattr(shards, "RELEASE_BYTES", 2**40)
    again = runs.read(starts, lengths)
    assert np.array_equal(again, np.tile(np.arange(1000), len(starts)))
    assert resident_bytes(tmp_path / "a.tokens") > count
