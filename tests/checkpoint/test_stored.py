"""Tensors of checkpoints in one file or many: any part, from whatever parts there are."""

from __future__ import annotations

import tempfile
from collections.abc import Mapping
from pathlib import Path

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from ranks_apart import cut, rows_of
from safetensors.torch import load_file
from torch import Tensor

from bigtrain.checkpoint import stored as module
from bigtrain.checkpoint.store import CheckpointStore
from bigtrain.checkpoint.stored import StoredTensors, file_name
from bigtrain.errors import CheckpointError
from bigtrain.sharding.part import Part

NAME = "weights.safetensors"
Files = list[tuple[dict[str, Tensor], dict[str, Part]]]


def publish(folder: Path, files: Files) -> Path:
    names = [file_name(NAME, index, len(files)) for index in range(len(files))]
    return CheckpointStore(folder).save(
        1,
        {name: tensors for name, (tensors, _) in zip(names, files, strict=True)},
        {"state.json": "{}"},
        {name: parts for name, (_, parts) in zip(names, files, strict=True)},
    )


def by_rows(wholes: Mapping[str, Tensor], shards: int) -> Files:
    files: Files = []
    for shard in range(shards):
        parts = {name: rows_of(tuple(whole.shape), shards, shard) for name, whole in wholes.items()}
        files.append(({name: cut(whole, parts[name]) for name, whole in wholes.items()}, parts))
    return files


def numbered(*shape: int) -> Tensor:
    return torch.arange(torch.Size(shape).numel(), dtype=torch.float32).reshape(shape)


def test_names_of_files() -> None:
    assert file_name(NAME, 0, 1) == NAME
    assert file_name(NAME, 3, 12) == "weights-00003-of-00012.safetensors"


@given(
    shapes=st.lists(st.lists(st.integers(1, 7), min_size=1, max_size=3), min_size=1, max_size=3),
    written=st.integers(1, 5),
    read=st.integers(1, 5),
)
@settings(max_examples=40, deadline=None)
def test_any_rows_from_any_rows(shapes: list[list[int]], written: int, read: int) -> None:
    wholes = {f"t{index}": numbered(*shape) for index, shape in enumerate(shapes)}
    with tempfile.TemporaryDirectory() as folder:
        found = StoredTensors(publish(Path(folder), by_rows(wholes, written)), NAME)
        assert set(found.entries) == set(wholes)
        for name, whole in wholes.items():
            assert found.shape(name) == tuple(whole.shape)
            for shard in range(read):
                part = rows_of(tuple(whole.shape), read, shard)
                assert torch.equal(found.read(name, part), cut(whole, part))
        assert all(torch.equal(tensor, wholes[name]) for name, tensor in found.whole())


def test_boxes_of_two_dims(tmp_path: Path) -> None:
    whole = numbered(6, 10)
    boxes = [Part((6, 10), (row, column), (3, 5)) for column in (5, 0) for row in (3, 0)]
    found = StoredTensors(publish(tmp_path, [({"t": cut(whole, box)}, {"t": box}) for box in boxes]), NAME)
    for part in (Part((6, 10), (1, 2), (4, 6)), Part((6, 10), (0, 9), (6, 1)), Part.of_whole((6, 10))):
        assert torch.equal(found.read("t", part), cut(whole, part))


def test_what_is_alike_everywhere_is_in_the_first_file(tmp_path: Path) -> None:
    files = by_rows({"t": numbered(4, 3)}, 2)
    files[0][0]["scale"] = torch.tensor([1.0, 2.0])
    found = StoredTensors(publish(tmp_path, files), NAME)
    assert torch.equal(found.read("scale", Part.of_whole((2,))), torch.tensor([1.0, 2.0]))
    assert dict(found.whole()).keys() == {"t", "scale"}


def test_the_library_reads_the_files(tmp_path: Path) -> None:
    whole = numbered(5, 3)
    folder = publish(tmp_path, by_rows({"t": whole}, 2))
    parts = [load_file(path)["t"] for path in sorted(folder.glob("weights-*"))]
    assert torch.equal(torch.cat(parts), whole)


def test_only_headers_that_are_needed_are_read(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    folder = publish(tmp_path, by_rows({"long": numbered(64, 2), "short": numbered(5), "odd": numbered(9, 2)}, 8))
    read: list[str] = []
    real = module.tensors.read_header
    monkeypatch.setattr(module.tensors, "read_header", lambda path: read.append(path.name[8:13]) or real(path))
    found = StoredTensors(folder, NAME)
    for name in found.entries:
        found.read(name, rows_of(found.shape(name), 8, 4))
    assert sorted(read) == ["00000", "00004"]


def test_files_that_are_not_of_the_checkpoint_are_not_read(tmp_path: Path) -> None:
    folder = publish(tmp_path, by_rows({"t": numbered(4, 3)}, 2))
    (folder / "weights-00002-of-00003.safetensors").write_bytes(b"planted")
    assert len(StoredTensors(folder, NAME).files) == 2


def test_a_checkpoint_without_the_file(tmp_path: Path) -> None:
    folder = publish(tmp_path, by_rows({"t": numbered(4, 3)}, 2))
    with pytest.raises(CheckpointError, match="holds no optimizer.safetensors"):
        StoredTensors(folder, "optimizer.safetensors")


def test_a_missing_part_is_told(tmp_path: Path) -> None:
    found = StoredTensors(publish(tmp_path, by_rows({"t": numbered(6, 3)}, 3)[:2]), NAME)
    assert torch.equal(found.read("t", Part((6, 3), (1, 0), (3, 3))), numbered(6, 3)[1:4])
    with pytest.raises(CheckpointError, match="6 elements of t are in none of its files"):
        found.read("t", Part.of_whole((6, 3)))


def test_files_of_different_wholes_are_told(tmp_path: Path) -> None:
    files = [by_rows({"t": numbered(6, 3)}, 2)[0], by_rows({"t": numbered(8, 3)}, 2)[1]]
    with pytest.raises(CheckpointError, match=r"t is of shape \(8, 3\), not \(6, 3\)"):
        StoredTensors(publish(tmp_path, files), NAME).read("t", Part.of_whole((6, 3)))


def test_a_part_of_another_size_than_it_says_is_told(tmp_path: Path) -> None:
    files = by_rows({"t": numbered(6, 3)}, 2)
    files[1][0]["t"] = numbered(2, 3)
    with pytest.raises(CheckpointError, match=r"t is torch.float32 of shape \(2, 3\) there"):
        StoredTensors(publish(tmp_path, files), NAME).read("t", Part.of_whole((6, 3)))
