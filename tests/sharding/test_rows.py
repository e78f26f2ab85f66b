"""Rows of tensors: cut as `fully_shard` cuts, taken and joined."""

from __future__ import annotations

from collections.abc import Iterator

import pytest
import torch
import torch.distributed as dist
from hypothesis import given
from hypothesis import strategies as st

from bigtrain.sharding.part import Part
from bigtrain.sharding.rows import join_rows, rows_of, take_rows

SHAPES = st.lists(st.integers(0, 7), min_size=1, max_size=3).map(tuple)


@pytest.fixture(scope="module")
def group() -> Iterator[None]:
    dist.init_process_group("gloo", store=dist.HashStore(), rank=0, world_size=1)
    yield
    dist.destroy_process_group()


@given(SHAPES, st.integers(1, 9))
def test_ranks_have_what_torch_chunk_gives_them(shape: tuple[int, ...], ranks: int) -> None:
    tensor = torch.randn(shape)
    chunks = list(tensor.chunk(ranks)) if shape[0] else [tensor]
    for rank in range(ranks):
        wanted = chunks[rank] if rank < len(chunks) else tensor[:0]
        part = rows_of(shape, rank, ranks)
        assert part.whole == shape
        assert part.shape == tuple(wanted.shape)
        assert torch.equal(take_rows(tensor, part), wanted)


@given(SHAPES, st.integers(1, 9))
def test_together_they_have_all_of_it_once(shape: tuple[int, ...], ranks: int) -> None:
    parts = [rows_of(shape, rank, ranks) for rank in range(ranks)]
    assert sum(part.shape[0] for part in parts) == shape[0]
    ends = [part.start[0] + part.shape[0] for part in parts]
    assert [part.start[0] for part in parts[1:]] == ends[:-1]


def test_a_number_is_whole_on_every_rank() -> None:
    number = torch.tensor(3.0)
    part = rows_of((), 2, 4)
    assert part == Part.of_whole(())
    assert torch.equal(take_rows(number, part), number)


def test_rows_are_in_memory_of_their_own() -> None:
    tensor = torch.zeros(4, 2, requires_grad=True)
    rows = take_rows(tensor, rows_of((4, 2), 0, 1))
    rows += 1
    assert not rows.requires_grad
    assert not tensor.any()


def test_one_rank_joins_its_own(group: None) -> None:
    rows = torch.randn(5, 2)
    assert torch.equal(join_rows(rows, rows_of((5, 2), 0, 1), torch.device("cpu")), rows)
    number = torch.tensor(2.0)
    assert torch.equal(join_rows(number, Part.of_whole(()), torch.device("cpu")), number)
