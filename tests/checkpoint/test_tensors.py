"""Tensors in files: the safetensors format, both ways, with digests."""

from __future__ import annotations

import hashlib
import json
import zlib
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file, save_file

from bigtrain.checkpoint import tensors
from bigtrain.checkpoint.boxes import Run
from bigtrain.errors import CheckpointError
from bigtrain.sharding.part import Part

CONTENT = {
    "a.weight": torch.arange(12, dtype=torch.float32).reshape(3, 4),
    "b": torch.tensor(7.5, dtype=torch.float64),
    "c": torch.randn(5, 2).to(torch.bfloat16),
    "empty": torch.zeros(0, 3),
    "d": torch.tensor([1, -2, 3], dtype=torch.int64),
    "e": torch.tensor([True, False]),
}


def same(one: dict[str, torch.Tensor], other: dict[str, torch.Tensor]) -> bool:
    return one.keys() == other.keys() and all(
        torch.equal(one[k], other[k]) and one[k].dtype == other[k].dtype for k in one
    )


def test_the_library_reads_what_is_written(tmp_path: Path) -> None:
    tensors.write_tensors(tmp_path / "x", CONTENT)
    assert same(load_file(tmp_path / "x"), CONTENT)


def test_what_the_library_writes_is_read(tmp_path: Path) -> None:
    save_file(CONTENT, tmp_path / "x", metadata={"format": "pt"})
    assert same(dict(tensors.read_tensors(tmp_path / "x")), CONTENT)


def test_a_tensor_that_is_not_contiguous(tmp_path: Path) -> None:
    tensors.write_tensors(tmp_path / "x", {"t": CONTENT["a.weight"].T})
    assert torch.equal(dict(tensors.read_tensors(tmp_path / "x"))["t"], CONTENT["a.weight"].T)


def test_no_tensor_at_all(tmp_path: Path) -> None:
    tensors.write_tensors(tmp_path / "x", {})
    assert dict(tensors.read_tensors(tmp_path / "x")) == {}


def test_the_digest_is_that_of_the_file(tmp_path: Path) -> None:
    written = tensors.write_tensors(tmp_path / "x", CONTENT)
    raw = (tmp_path / "x").read_bytes()
    assert written == tensors.digest(tmp_path / "x")
    assert written == (len(raw), zlib.crc32(raw), hashlib.sha256(raw).hexdigest())


def test_nothing_is_written_over(tmp_path: Path) -> None:
    tensors.write_bytes(tmp_path / "x", b"first")
    with pytest.raises(FileExistsError):
        tensors.write_bytes(tmp_path / "x", b"second")
    assert (tmp_path / "x").read_bytes() == b"first"


@pytest.mark.parametrize("kept", [0, 4, 8, 40, -1])
def test_a_cut_file_is_refused(tmp_path: Path, kept: int) -> None:
    tensors.write_tensors(tmp_path / "x", CONTENT)
    raw = (tmp_path / "x").read_bytes()
    (tmp_path / "x").write_bytes(raw[:kept])
    with pytest.raises(CheckpointError, match="damaged"):
        dict(tensors.read_tensors(tmp_path / "x"))


@pytest.mark.parametrize(
    "entry",
    [
        {"dtype": "F32", "shape": [2**40], "data_offsets": [0, 2**42]},
        {"dtype": "F32", "shape": [2], "data_offsets": [-8, 0]},
        {"dtype": "F32", "shape": [3], "data_offsets": [0, 8]},
        {"dtype": "XX", "shape": [2], "data_offsets": [0, 8]},
        {"shape": [2]},
        "text",
    ],
)
def test_a_header_that_does_not_fit_is_refused(tmp_path: Path, entry: object) -> None:
    header = json.dumps({"t": entry}).encode()
    (tmp_path / "x").write_bytes(len(header).to_bytes(8, "little") + header + bytes(8))
    with pytest.raises(CheckpointError, match="damaged"):
        dict(tensors.read_tensors(tmp_path / "x"))


@pytest.mark.parametrize("dtype", ["F8_E4M3", "U32"])
def test_a_type_that_is_not_used_here_is_named(tmp_path: Path, dtype: str) -> None:
    header = json.dumps({"t": {"dtype": dtype, "shape": [2], "data_offsets": [0, 8]}}).encode()
    (tmp_path / "x").write_bytes(len(header).to_bytes(8, "little") + header + bytes(8))
    with pytest.raises(CheckpointError, match=rf"/x: t is of type {dtype}; convert it to F32, BF16 or F16$"):
        tensors.read_header(tmp_path / "x")


def test_a_header_longer_than_the_file_is_refused(tmp_path: Path) -> None:
    (tmp_path / "x").write_bytes((2**60).to_bytes(8, "little") + b"{}")
    with pytest.raises(CheckpointError, match="a header of"):
        tensors.read_header(tmp_path / "x")


def test_a_file_says_of_what_its_tensors_are_parts(tmp_path: Path) -> None:
    part = Part((9, 4), (3, 0), (3, 4))
    tensors.write_tensors(tmp_path / "x", CONTENT, {"a.weight": part})
    entries = tensors.read_header(tmp_path / "x")
    assert {name: entry.part for name, entry in entries.items() if entry.part} == {"a.weight": part}
    assert same(load_file(tmp_path / "x"), CONTENT)
    assert same(dict(tensors.read_tensors(tmp_path / "x")), CONTENT)


@pytest.mark.parametrize("metadata", ["text", 3, [], {"t": "[[2],[1],[2]]"}, {"t": 7}, {"t": "[[2],[0]]"}, {"t": "{"}])
def test_metadata_that_is_none_is_refused(tmp_path: Path, metadata: object) -> None:
    header = json.dumps(
        {"__metadata__": metadata, "t": {"dtype": "F32", "shape": [2], "data_offsets": [0, 8]}}
    ).encode()
    (tmp_path / "x").write_bytes(len(header).to_bytes(8, "little") + header + bytes(8))
    with pytest.raises(CheckpointError, match="damaged"):
        tensors.read_header(tmp_path / "x")


def test_metadata_of_others_is_passed_over(tmp_path: Path) -> None:
    save_file({"t": torch.ones(2)}, tmp_path / "x", metadata={"format": "pt", "made by": "someone"})
    assert tensors.read_header(tmp_path / "x")["t"].part is None


def test_runs_are_read_to_their_places_and_nothing_else_is_changed(tmp_path: Path) -> None:
    tensors.write_tensors(tmp_path / "x", CONTENT)
    entry = tensors.read_header(tmp_path / "x")["a.weight"]
    into = torch.full((2, 3), -1.0)
    tensors.read_runs(tmp_path / "x", entry, [Run(4, 0, 2), Run(11, 5, 1), Run(0, 3, 0)], into)
    assert into.tolist() == [[4, 5, -1], [-1, -1, 11]]


def test_a_file_that_ends_too_soon_is_told(tmp_path: Path) -> None:
    tensors.write_tensors(tmp_path / "x", {"t": torch.ones(8)})
    entry = tensors.read_header(tmp_path / "x")["t"]
    (tmp_path / "x").write_bytes((tmp_path / "x").read_bytes()[:-4])
    with pytest.raises(CheckpointError, match="ends before its tensors do"):
        tensors.read_runs(tmp_path / "x", entry, [Run(0, 0, 8)], torch.empty(8))


def test_a_header_that_could_not_be_read_again_is_not_written(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    many = {f"t{number}": torch.zeros(1) for number in range(2000)}
    tensors.write_tensors(tmp_path / "a.safetensors", many)
    monkeypatch.setattr(tensors, "MAX_HEADER_VALUES", 5000)
    with pytest.raises(CheckpointError, match="its header holds more than 5,000 values; use fewer tensors"):
        tensors.write_tensors(tmp_path / "b.safetensors", many)
    assert not (tmp_path / "b.safetensors").exists()
