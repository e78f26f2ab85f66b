"""Optimizer states in blocks: bit by bit where blocks fall alike, else to the nearest; and what is spread how."""

from __future__ import annotations

import math
import tempfile
from pathlib import Path

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from ranks_apart import cut, rows_of
from torch import Tensor

from bigtrain.checkpoint.moments import Moment, kind_of, part_of, read_moment
from bigtrain.checkpoint.store import CheckpointStore
from bigtrain.checkpoint.stored import StoredTensors, file_name
from bigtrain.errors import CheckpointError
from bigtrain.optim import Adafactor, AdamW, Muon
from bigtrain.optim.quantize import State, codec_for
from bigtrain.optim.recode import decode, encode
from bigtrain.sharding.part import Part

NAME, FILE = "layer.weight.exp_avg", "optimizer.safetensors"
LOW = ("8bit", "4bit")
USES = {"first": "exp_avg", "second": "exp_avg"}


def values_of(shape: tuple[int, ...], use: str = "first", seed: int = 0) -> Tensor:
    found = torch.randn(shape, generator=torch.Generator().manual_seed(seed))
    return found if use == "first" else found.square()


def codec(part: Part, use: str, state: str):
    return codec_for("exp_avg", use, state, math.prod(part.shape))


def publish(folder: Path, states: list[State], parts: list[Part]) -> StoredTensors:
    names = [file_name(FILE, index, len(states)) for index in range(len(states))]
    files = {
        name: {f"layer.weight.{key}": tensor for key, tensor in state.items()}
        for name, state in zip(names, states, strict=True)
    }
    metadata = {} if len(states) == 1 else {name: {NAME: part} for name, part in zip(names, parts, strict=True)}
    return StoredTensors(CheckpointStore(folder).save(1, files, {}, metadata), FILE)


def stored_in(folder: Path, values: Tensor, use: str, state: str, shards: int) -> tuple[StoredTensors, list[State]]:
    parts = [rows_of(tuple(values.shape), shards, shard) for shard in range(shards)]
    states = [encode(codec(part, use, state), cut(values, part)) for part in parts]
    return publish(folder, states, parts), states


def read_all(
    stored: StoredTensors, shape: tuple[int, ...], use: str, was: str, now: str, shards: int
) -> tuple[list[State], int]:
    """Return the state of each of some ranks, and how many of them rounded."""
    moment = Moment(NAME, "exp_avg", use, was)
    found = [read_moment(stored, moment, rows_of(shape, shards, shard), now) for shard in range(shards)]
    return [state for state, _ in found], sum(anew for _, anew in found)


def joined(states: list[State], shape: tuple[int, ...], use: str, state: str) -> Tensor:
    """Return the numbers that some ranks have between them."""
    found = []
    for shard, kept in enumerate(states):
        part = rows_of(shape, len(states), shard)
        found.append(torch.empty(part.shape))
        decode(codec(part, use, state), kept, found[-1])
    return torch.cat(found)


def alike(one: list[State], other: list[State]) -> bool:
    return all(
        a.keys() == b.keys() and all(torch.equal(a[key], b[key]) for key in a) for a, b in zip(one, other, strict=True)
    )


@pytest.mark.parametrize("state", ["fp32", "bf16"])
@given(rows=st.integers(1, 9), width=st.integers(1, 5), written=st.integers(1, 5), read=st.integers(1, 5))
@settings(max_examples=25, deadline=None)
def test_whole_numbers_come_to_any_ranks_bit_by_bit(state: str, rows: int, width: int, written: int, read: int) -> None:
    values = values_of((rows, width)).to(torch.bfloat16).float()
    with tempfile.TemporaryDirectory() as folder:
        stored, _ = stored_in(Path(folder), values, "first", state, written)
        states, rounded = read_all(stored, (rows, width), "first", state, state, read)
    assert torch.equal(torch.cat([kept["exp_avg"] for kept in states]).float(), values)
    assert not rounded


@pytest.mark.parametrize("state", LOW)
@pytest.mark.parametrize("use", USES)
@pytest.mark.parametrize("shape", [(64, 256), (75, 256), (40, 512), (20000,)])
def test_the_same_ranks_get_what_they_had(tmp_path: Path, state: str, use: str, shape: tuple[int, ...]) -> None:
    for shards in (1, 2, 3):
        stored, states = stored_in(tmp_path / str(shards), values_of(shape, use), use, state, shards)
        again, rounded = read_all(stored, shape, use, state, state, shards)
        assert alike(states, again)
        assert not rounded


@pytest.mark.parametrize("state", LOW)
@pytest.mark.parametrize("use", USES)
def test_rows_of_whole_blocks_come_to_any_ranks_bit_by_bit(tmp_path: Path, state: str, use: str) -> None:
    shape = (64, 256)
    stored, first = stored_in(tmp_path / "0", values_of(shape, use), use, state, 4)
    numbers = joined(first, shape, use, state)
    for index, shards in enumerate((2, 1, 4, 3, 4), 1):
        states, rounded = read_all(stored, shape, use, state, state, shards)
        assert not rounded
        assert torch.equal(joined(states, shape, use, state), numbers)
        parts = [rows_of(shape, shards, shard) for shard in range(shards)]
        stored = publish(tmp_path / str(index), states, parts)
    assert alike(states, first)


@pytest.mark.parametrize("state", LOW)
@pytest.mark.parametrize("use", USES)
@pytest.mark.parametrize(("written", "read"), [(1, 2), (2, 1), (2, 3), (3, 2)])
def test_blocks_that_fall_differently_are_rounded_to_the_nearest(
    tmp_path: Path, state: str, use: str, written: int, read: int
) -> None:
    shape = (150, 100)  # no rank's rows are whole blocks
    stored, states = stored_in(tmp_path, values_of(shape, use), use, state, written)
    before = joined(states, shape, use, state)
    found, rounded = read_all(stored, shape, use, state, state, read)
    assert rounded
    expected = [encode(codec(part, use, state), cut(before, part)) for part in parts_of(shape, read)]
    unaligned = [kept for kept, wanted in zip(found, expected, strict=True) if not alike([kept], [wanted])]
    assert len(unaligned) <= 1  # the first rank's blocks are those that were stored
    after = joined(found, shape, use, state)
    assert float((after - before).norm() / before.norm()) < {"8bit": 0.05, "4bit": 0.35}[state]


def parts_of(shape: tuple[int, ...], shards: int) -> list[Part]:
    return [rows_of(shape, shards, shard) for shard in range(shards)]


@pytest.mark.parametrize("state", LOW)
@pytest.mark.parametrize("use", USES)
def test_too_few_elements_for_blocks_and_back(tmp_path: Path, state: str, use: str) -> None:
    shape = (60, 100)
    stored, states = stored_in(tmp_path / "one", values_of(shape, use), use, state, 1)
    numbers = joined(states, shape, use, state)
    apart, rounded = read_all(stored, shape, use, state, state, 5)
    assert not rounded
    assert all(kept["exp_avg"].dtype == torch.float32 and kept.keys() == {"exp_avg"} for kept in apart)
    assert torch.equal(torch.cat([kept["exp_avg"] for kept in apart]), numbers)
    parts = parts_of(shape, 5)
    again, rounded = read_all(publish(tmp_path / "five", apart, parts), shape, use, state, state, 1)
    assert rounded == 1
    assert torch.allclose(joined(again, shape, use, state), numbers, rtol=1e-6)


@pytest.mark.parametrize("was", ["fp32", "bf16", *LOW])
@pytest.mark.parametrize("now", ["fp32", "bf16", *LOW])
def test_any_format_becomes_any_other(tmp_path: Path, was: str, now: str) -> None:
    shape = (64, 100)
    stored, states = stored_in(tmp_path, values_of(shape), "first", was, 1)
    before = joined(states, shape, "first", was)
    found, _ = read_all(stored, shape, "first", was, now, 1)
    expected = encode(codec(Part.of_whole(shape), "first", now), before)
    assert alike(found, [expected if was != now else states[0]])


def test_boxes_of_columns_are_rounded_row_by_row(tmp_path: Path) -> None:
    shape = (40, 300)
    parts = [Part(shape, (0, 0), (40, 150)), Part(shape, (0, 150), (40, 150))]
    values = values_of(shape)
    states = [encode(codec(part, "first", "8bit"), cut(values, part)) for part in parts]
    moment = Moment(NAME, "exp_avg", "first", "8bit")
    state, rounded = read_moment(publish(tmp_path, states, parts), moment, Part.of_whole(shape), "8bit")
    found = torch.empty(shape)
    decode(codec(Part.of_whole(shape), "first", "8bit"), state, found)
    assert rounded
    assert float((found - values).norm() / values.norm()) < 0.05


def test_ranks_without_rows(tmp_path: Path) -> None:
    shape = (2, 3000)
    stored, _ = stored_in(tmp_path, values_of(shape), "first", "8bit", 4)
    states, _ = read_all(stored, shape, "first", "8bit", "8bit", 5)
    assert [tuple(kept["exp_avg"].shape) for kept in states] == [(1, 3000), (1, 3000), (0, 3000), (0, 3000), (0, 3000)]


def parameters() -> list[torch.nn.Parameter]:
    return [torch.nn.Parameter(torch.zeros(4, 3)), torch.nn.Parameter(torch.zeros(4))]


def test_kinds_of_states() -> None:
    matrix, vector = parameters()
    muon = Muon([{"params": [matrix], "orthogonal": True}, {"params": [vector]}], state="8bit")
    assert kind_of(muon, matrix, "momentum", (4, 3), (4, 3)) == "moment"
    assert kind_of(muon, matrix, "momentum_scale", (1,), (4, 3)) == "scale"
    assert kind_of(muon, vector, "exp_avg_sq", (4,), (4,)) == "moment"
    assert kind_of(muon, vector, "remainder", (4,), (4,)) == "cut"
    assert kind_of(muon, vector, "step", (), (4,)) == "whole"
    factored = Adafactor([matrix])
    assert kind_of(factored, matrix, "row", (4,), (4, 3)) == "row"
    assert kind_of(factored, matrix, "column", (3,), (4, 3)) == "whole"
    assert kind_of(AdamW([matrix]), matrix, "exp_avg", (4, 3), (4, 3)) == "moment"
    others = torch.optim.SGD([matrix], lr=0.1)
    assert kind_of(others, matrix, "momentum_buffer", (4, 3), (4, 3)) == "cut"
    assert kind_of(others, matrix, "step", (), (4, 3)) == "whole"


def test_a_state_of_unknown_shape_cannot_be_spread() -> None:
    matrix, _ = parameters()
    with pytest.raises(CheckpointError, match=r"SGD: its state 'odd' of shape \(7,\), of a parameter of \(4, 3\)"):
        kind_of(torch.optim.SGD([matrix], lr=0.1), matrix, "odd", (7,), (4, 3))


def test_parts_of_states() -> None:
    part = Part((8, 3), (2, 0), (4, 3))
    assert part_of("row", part) == Part((8,), (2,), (4,))
    assert part_of("moment", part) == part_of("cut", part) == part
    assert part_of("whole", part) is None
    assert part_of("scale", part) is None
