"""What a rank has of a model, and which of those that have it between them writes what."""

from __future__ import annotations

import dataclasses
from typing import Any

import pytest
from group import told_by_all
from torch import nn

from bigtrain.errors import InputError
from bigtrain.optim import AdamW, Lamb
from bigtrain.sharding.part import Part
from bigtrain.spread import Spread, connect_parts
from bigtrain.world import ALONE, World


class Model(nn.Module):
    """A layer that may be cut, and one that never is."""

    def __init__(self, rows: int = 8) -> None:
        super().__init__()
        self.layer = nn.Linear(3, rows, bias=False)
        self.norm = nn.LayerNorm(3)


class Shared:
    """What ranks that share products have: rows of the layer, some here and some there."""

    ranks = 2

    def __init__(self, rank: int) -> None:
        self.rank = rank
        self.parts = {"layer.weight": Part.of_rows((8, 3), [(2 * rank, 2), (4 + 2 * rank, 2)])}

    def copies(self, name: str) -> int:
        return 1 if name in self.parts else self.ranks

    def part(self, name: str, rows: Part) -> Part:
        return self.parts[name].narrow(rows.start[0], rows.shape[0]) if name in self.parts else rows


class Sharded:
    """What ranks that share rows have: half of what is there."""

    shards, replicate = 2, 3

    def __init__(self, model: nn.Module, shard_rank: int) -> None:
        self.shard_rank = shard_rank
        self.parameters = dict(model.named_parameters())
        self.parts = {}
        for name, parameter in self.parameters.items():
            rows, *rest = parameter.shape
            half = -(-rows // 2)
            first = min(shard_rank * half, rows)
            self.parts[name] = Part((rows, *rest), (first, *(0 for _ in rest)), (min(half, rows - first), *rest))


def spread(tensor_rank: int | None = None, shard_rank: int | None = None) -> Spread:
    model = Model(8 if tensor_rank is None else 4)
    shared: Any = None if tensor_rank is None else Shared(tensor_rank)
    sharded: Any = None if shard_rank is None else Sharded(model, shard_rank)
    return Spread(model, ALONE if shared is None and sharded is None else World(0, 12), shared, sharded)


def test_alone_a_rank_has_everything() -> None:
    found = spread()
    assert (found.shards, found.shard_rank, found.replicate) == (1, 0, 1)
    assert all(part.complete for part in found.parts.values())
    assert found.own == found.parameters.keys() == {"layer.weight", "norm.weight", "norm.bias"}
    assert {found.copies(name) for name in found.own} == {1}


@pytest.mark.parametrize("rank", [0, 1])
def test_ranks_that_share_products_write_what_they_have_alone(rank: int) -> None:
    found = spread(tensor_rank=rank)
    assert (found.shards, found.shard_rank, found.replicate) == (2, rank, 1)
    assert found.own == (found.parameters.keys() if rank == 0 else {"layer.weight"})
    assert found.parts["layer.weight"].rows == ((2 * rank, 2), (4 + 2 * rank, 2))
    assert [found.copies(name) for name in ("layer.weight", "norm.weight")] == [1, 2]
    assert dataclasses.replace(found, world=World(6 + rank, 12)).reader == 3


@pytest.mark.parametrize(("tensor_rank", "shard_rank"), [(0, 0), (1, 0), (0, 1), (1, 1)])
def test_both_together_are_a_box_or_two(tensor_rank: int, shard_rank: int) -> None:
    found = spread(tensor_rank, shard_rank)
    assert (found.shards, found.shard_rank, found.replicate) == (4, 2 * shard_rank + tensor_rank, 3)
    part = found.parts["layer.weight"]
    assert (part.whole, part.start, part.shape) == ((8, 3), (4 * shard_rank + 2 * tensor_rank, 0), (2, 3))
    assert found.parts["norm.bias"].shape == ((2,) if shard_rank == 0 else (1,))


def test_every_element_is_written_once() -> None:
    written: list[tuple[str, int]] = []
    for tensor_rank in (0, 1):
        for shard_rank in (0, 1):
            found = spread(tensor_rank, shard_rank)
            for name in found.own:
                for box in found.parts[name].boxes:
                    written += [(name, row) for row in range(box.start[0], box.start[0] + box.shape[0])]
    expected = [("layer.weight", row) for row in range(8)]
    expected += [(name, row) for name in ("norm.bias", "norm.weight") for row in range(3)]
    assert sorted(written) == sorted(expected)


def test_an_optimizer_of_whole_matrices_is_refused() -> None:
    parameters = list(Model().parameters())
    shared: Any = Shared(0)
    connect_parts(AdamW(parameters), None, shared)
    with pytest.raises(InputError, match=r"tensor_parallel: Lamb needs whole parameters.*AdamW, or .*parallel=1"):
        connect_parts(Lamb(parameters), None, shared)


EQUAL = """
import json, os, torch
from torch import nn
from bigtrain.spread import make_equal
from bigtrain.world import joined
with joined(kind="cpu", timeout_seconds=60) as world:
    torch.manual_seed(world.rank)
    model = nn.Sequential(nn.Linear(3, 3), nn.BatchNorm1d(3))
    model[1].running_mean.fill_(world.rank)
    before = torch.cat([t.flatten().double() for t in model.state_dict().values()]).tolist()
    make_equal(model, world)
    after = torch.cat([t.flatten().double() for t in model.state_dict().values()]).tolist()
    meta = nn.Linear(3, 3, device="meta")
    make_equal(meta, world)
    told = world.gather(json.dumps([before, after]))
    if world.first:
        print(json.dumps({"ranks": [json.loads(text) for text in told]}))
"""


def test_models_that_were_made_on_each_rank_become_the_first_ranks() -> None:
    ((told,), _) = told_by_all(["-c", EQUAL], 2)
    (first, kept), (other, taken) = told["ranks"]
    assert first != other and kept == taken == first
