"""Rows of parameters on three real ranks: each optimizer does to them what it does to whole parameters."""

from __future__ import annotations

import math
from collections.abc import Iterator
from itertools import pairwise
from pathlib import Path
from typing import Any

import pytest
import torch
import torch.distributed as dist
from group import RANK, told_by_all
from hypothesis import given
from hypothesis import strategies as st
from ranks_exchange import CASES, HEAVY, SHAPES, STEPS
from torch import nn
from torch.testing._internal.distributed.fake_pg import FakeStore

from bigtrain.errors import InputError
from bigtrain.optim import Adafactor, AdamW, Lamb, Muon
from bigtrain.optim.cost import EXCHANGED_ELEMENTS, buffer_bytes, buffer_elements, tensor_temporary_bytes
from bigtrain.optim.exchange import Exchange, connect

RANKS = Path(__file__).parents[1] / "shared" / "ranks_exchange.py"
WORLD_SIZE = 3
STEPPED = STEPS - 1
"""One step is left out."""

MOVED = {"bf16": 0.15, "8bit": 0.15, "4bit": 0.8}
"""How far from each other two roundings may end, in terms of the way that they have gone in five steps.

Bf16 weights alone, which those of 4 bits are here, have steps of 0.8% to go 0.2% at a time.
"""


@pytest.fixture(scope="module")
def found(tmp_path_factory: pytest.TempPathFactory) -> list[list[dict[str, Any]]]:
    """Return what each rank found, line by line."""
    return told_by_all([RANKS, RANK, WORLD_SIZE, tmp_path_factory.mktemp("exchange") / "store"], WORLD_SIZE)


each = pytest.mark.parametrize("place", range(len(CASES)), ids=["-".join(map(str, case.values())) for case in CASES])


@pytest.mark.slow
@each
def test_rows_go_where_the_whole_goes(place: int, found: list[list[dict[str, Any]]]) -> None:
    case = CASES[place]
    exact = case["name"] in ("adamw", "muon") and case["state"] == case["weights"] == "fp32"
    for rank in found:
        lines = rank[place]
        assert lines["finite"]
        assert lines["same_steps"]
        assert lines["first"]
        if case["state"] == case["weights"] == "fp32":
            assert all(far <= (0 if exact else 1e-6 * length) for far, length, _ in lines["differences"])
        else:
            far, _, way = (math.hypot(*lengths) for lengths in zip(*lines["differences"], strict=True))
            assert far <= MOVED[case["state"]] * way


@pytest.mark.slow
@each
def test_a_step_left_out_changes_nothing_on_any_rank(place: int, found: list[list[dict[str, Any]]]) -> None:
    assert all(rank[place]["kept"] for rank in found)


@pytest.mark.slow
@each
def test_states_of_rows_are_predicted(place: int, found: list[list[dict[str, Any]]]) -> None:
    assert all(rank[place]["predicted"] == rank[place]["state"] for rank in found)


def calls(name: str, found: list[list[dict[str, Any]]]) -> dict[str, int]:
    """Return the collectives of an optimizer, which are those of all ranks."""
    place = next(place for place, case in enumerate(CASES) if case["name"] == name)
    (made,) = {tuple(rank[place]["calls"].items()) for rank in found}
    return dict(made)


@pytest.mark.slow
def test_lamb_adds_up_all_norms_at_once(found: list[list[dict[str, Any]]]) -> None:
    matrices = sum(len(shape) >= 2 for shape in SHAPES)
    assert calls("lamb", found) == {f"add [{matrices}, 2] torch.float64": STEPPED}


@pytest.mark.slow
def test_adafactor_adds_up_columns_and_then_lengths(found: list[list[dict[str, Any]]]) -> None:
    columns = [math.prod(shape[1:]) for shape in SHAPES if len(shape) >= 2]
    kinds = {
        f"add [{sum(columns) + len(columns)}] torch.float32": STEPPED,
        f"add [{len(columns)}] torch.float64": STEPPED,
        f"add [{len(SHAPES) - len(columns)}] torch.float64": STEPPED,
    }
    assert calls("adafactor", found) == kinds


@pytest.mark.slow
def test_muon_deals_a_matrix_to_each_rank(found: list[list[dict[str, Any]]]) -> None:
    hands = -(-sum(len(shape) == 2 for shape in SHAPES) // WORLD_SIZE)
    assert calls("muon", found) == {"deal": hands * STEPPED, "take back": hands * STEPPED}


@pytest.mark.slow
def test_adamw_needs_nobody(found: list[list[dict[str, Any]]]) -> None:
    assert calls("adamw", found) == {}


@pytest.mark.slow
def test_columns_come_in_buckets(found: list[list[dict[str, Any]]]) -> None:
    for rank in found:
        narrow = rank[len(CASES)]
        assert len(narrow["calls"]) > 3
        assert all(far <= 1e-6 * length for far, length, _ in narrow["differences"])


@pytest.mark.slow
def test_what_a_step_holds_is_predicted(found: list[list[dict[str, Any]]]) -> None:
    mine = [(100, 200)] * 5 + [(34, 200), (67,)]
    muon, adafactor, lamb = found[0][len(CASES) + 1 : len(CASES) + 4]
    rows = 4 * WORLD_SIZE * math.prod(mine[0])
    assert muon == {"peak": rows + tensor_temporary_bytes("muon", HEAVY[0], matrix=True), "buffers": 0}
    assert adafactor["peak"] == tensor_temporary_bytes("adafactor", mine[0], sharded=True)
    assert adafactor["buffers"] == buffer_bytes("adafactor", "fp32", "fp32", mine, sharded=True)
    assert adafactor["buffers"] == 4 * (EXCHANGED_ELEMENTS + buffer_elements(math.prod(mine[0])))
    assert lamb["peak"] < 1024
    assert lamb["buffers"] == buffer_bytes("lamb", "fp32", "fp32", mine, sharded=True)


@pytest.mark.slow
@pytest.mark.parametrize("place", [-2, -1], ids=["stage 1", "stage 3"])
def test_gradients_are_released_under_fully_shard(place: int, found: list[list[dict[str, Any]]]) -> None:
    lines = [rank[place] for rank in found]
    assert all(line["same"] for line in lines)
    assert lines[-1]["empty"]
    for line in lines:
        kept, released = line["norms"][:3], line["norms"][3:]
        assert released == pytest.approx(kept, rel=1e-6)


@pytest.fixture
def second_of_three() -> Iterator[None]:
    """Pretend to be a rank among three of which the others are silent."""
    dist.init_process_group("fake", store=FakeStore(), rank=1, world_size=3)
    yield
    dist.destroy_process_group()


def parameter(*shape: int) -> nn.Parameter:
    return nn.Parameter(torch.zeros(shape))


@pytest.mark.usefixtures("second_of_three")
@pytest.mark.parametrize(
    ("whole", "mine"),
    [((7, 5), (3, 5)), ((2, 3), (1, 3)), ((1, 4), (0, 4)), ((4,), (2,)), ((), (0,)), ((0, 3), (0, 3))],
    ids=str,
)
def test_rows_are_those_of_chunk(whole: tuple[int, ...], mine: tuple[int, ...]) -> None:
    own = parameter(*mine)
    exchange = Exchange(None, {own: whole})
    assert (exchange.rank, exchange.size) == (1, 3)
    assert exchange.whole(own) == whole


@pytest.mark.usefixtures("second_of_three")
@pytest.mark.parametrize(("whole", "mine"), [((7, 5), (2, 5)), ((7, 5), (7, 5)), ((7, 5), (3, 4)), ((), ())], ids=str)
def test_other_rows_are_refused(whole: tuple[int, ...], mine: tuple[int, ...]) -> None:
    with pytest.raises(InputError, match="rank 1 of 3 has rows of shape .* cut it by rows, as torch.chunk does"):
        Exchange(None, {parameter(*mine): whole})


@pytest.mark.usefixtures("second_of_three")
def test_a_parameter_that_was_not_told_of_is_refused() -> None:
    exchange = Exchange(None, {})
    with pytest.raises(InputError, match="was added to the optimizer after"):
        exchange.whole(parameter(3))


@given(sizes=st.lists(st.integers(0, 40), max_size=12), world_size=st.integers(1, 5))
def test_every_parameter_is_dealt_once(sizes: list[int], world_size: int) -> None:
    exchange: Any = object.__new__(Exchange)
    parameters = [parameter(0, 2) for _ in sizes]
    exchange.size = world_size
    exchange._wholes = {own: (size, 2) for own, size in zip(parameters, sizes, strict=True)}
    hands = list(exchange.hands(parameters))
    assert sorted(id(own) for hand in hands for own in hand) == sorted(map(id, parameters))
    assert all(len(hand) == world_size for hand in hands[:-1])
    dealt = [exchange.whole(own)[0] for hand in hands for own in hand]
    assert all(one >= other for one, other in pairwise(dealt))


@given(rows=st.integers(0, 50), world_size=st.integers(1, 12))
def test_rows_are_as_torch_cuts_them(rows: int, world_size: int) -> None:
    exchange: Any = object.__new__(Exchange)
    exchange.size = world_size
    cut = [len(part) for part in torch.chunk(torch.empty(rows), world_size)] if rows else []
    assert [exchange._rows((rows,), rank)[0] for rank in range(world_size)] == cut + [0] * (world_size - len(cut))


@pytest.mark.usefixtures("second_of_three")
@pytest.mark.parametrize("kind", [AdamW, Lamb, Muon, Adafactor])
def test_ours_are_connected(kind: Any) -> None:
    own = parameter(3, 5)
    optimizer, exchange = kind([own], 0.1), Exchange(None, {own: (7, 5)})
    assert optimizer.exchange is None
    connect(optimizer, exchange)
    assert optimizer.exchange is exchange


@pytest.mark.usefixtures("second_of_three")
@pytest.mark.parametrize("kind", [torch.optim.Adafactor, torch.optim.LBFGS, torch.optim.Muon])
def test_those_that_need_whole_tensors_are_refused(kind: Any) -> None:
    with pytest.raises(InputError, match=r"zero_stage: \w+ needs whole parameters, .* or sharding.zero_stage=0"):
        connect(kind([parameter(3, 5)], 0.1), Exchange(None, {}))


@pytest.mark.usefixtures("second_of_three")
def test_one_that_says_so_is_refused_too() -> None:
    optimizer: Any = torch.optim.SGD([parameter(3, 5)], 0.1)
    connect(optimizer, Exchange(None, {}))
    optimizer.elementwise = False
    with pytest.raises(InputError, match="SGD needs whole parameters"):
        connect(optimizer, Exchange(None, {}))
