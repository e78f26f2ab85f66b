"""The search over any model's choices, on traces made by hand."""

from __future__ import annotations

import dataclasses
from typing import Any

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from bigtrain.errors import DoesNotFit
from bigtrain.memory.blockwise import BlockKind, Kept, ModelTrace, Outside, Span
from bigtrain.memory.report import MemoryReport
from bigtrain.planner import module_search
from bigtrain.planner.choice import Choice
from bigtrain.planner.hardware import of_name
from bigtrain.planner.module_search import Module, Prices, search_module, sharding_bytes
from bigtrain.planner.price import beside_bytes

MIB = 2**20
CPU = of_name("cpu-laptop")
BESIDE = beside_bytes(CPU)
BLOCKS = 4
ROW = 10 * MIB
"""What a block keeps of a row."""


def trace(rows: int) -> ModelTrace:
    """Return a trace of blocks that keep so much of a row, take a second a pass, and each row a tenth more."""
    time = 1 + 0.1 * rows
    kept = {
        "none": Kept(0, ROW * rows, 0, 0, time, 2 * time),
        "selective": Kept(0, ROW * rows // 2, ROW * rows // 2, ROW * rows // 2, time, 2.2 * time),
        "full": Kept(0, ROW * rows // 10, ROW * rows, ROW * rows, time, 3 * time),
    }
    kind = BlockKind("Block", 2 * MIB, MIB, 1, 1, kept)
    still = tuple(Span(0, 0) for _ in range(BLOCKS))
    outside = Outside(still, Span(0, 0), still, 0)
    return ModelTrace(8 * MIB, 0, (kind,), (0,) * BLOCKS, outside, outside, places=tuple(range(BLOCKS)))


def module(**changes: Any) -> Module:
    traced: list[int] = []

    def trace_at(rows: int) -> ModelTrace:
        traced.append(rows)
        return trace(rows)

    found = Module(
        rows=16,
        blocks=BLOCKS,
        world_size=1,
        weight_bytes=8 * MIB,
        state_bytes=16 * MIB,
        gradient_bytes=8 * MIB,
        update_bytes=33 * MIB,
        update_seconds=0.5,
        hardware=CPU,
        trace=trace_at,
        exact=lambda choice: MemoryReport({"activations": Prices(found).held_bytes(choice)}),
        sending=lambda choice, forward, backward: 0.0,
    )
    return dataclasses.replace(found, **changes)


def search(budget_mib: int, **changes: Any) -> Any:
    beside = beside_bytes(CPU, changes.get("world_size", 1))
    return search_module(module(**changes), budget_mib * MIB + beside, name="Net")


def test_with_room_the_largest_micro_batch_without_recomputation_wins() -> None:
    found = search(10_000)
    assert found.choice == Choice(16, 1, ("none",) * BLOCKS)
    assert found.memory.allocated_bytes_peak == (24 + 16 * BLOCKS * 10) * MIB
    assert found.seconds.total == pytest.approx(BLOCKS * 3 * 2.6 + 0.5)


def test_with_less_room_the_first_blocks_compute_again() -> None:
    found = search(600)
    assert found.choice.micro_batch_size == 16
    assert 0 < found.choice.recompute.count("none") < BLOCKS
    order = [("full", "selective", "none").index(policy) for policy in found.choice.recompute]
    assert order == sorted(order)


def test_with_little_room_the_micro_batch_shrinks() -> None:
    found = search(60)
    assert found.choice.micro_batch_size < 16
    assert found.choice.accumulation_steps == 16 // found.choice.micro_batch_size


@settings(max_examples=25, deadline=None)
@given(st.integers(45, 800))
def test_the_choice_is_the_fastest_of_all_that_fit(budget_mib: int) -> None:
    subject = module()
    prices = Prices(subject)
    found = search_module(subject, budget_mib * MIB + BESIDE, name="Net")
    every = [
        dataclasses.replace(setting, recompute=policies)
        for setting in module_search.settings(subject)
        for _, policies in module_search.mixes(subject)
    ]
    fast = min(prices.seconds(c).total for c in every if prices.held_bytes(c) <= budget_mib * MIB)
    assert found.memory.allocated_bytes_peak <= budget_mib * MIB
    assert found.seconds.total <= fast * (1 + module_search.ALIKE)


def test_two_sizes_are_traced_and_the_rest_is_composed() -> None:
    seen: list[int] = []

    def traced(rows: int) -> ModelTrace:
        seen.append(rows)
        return trace(rows)

    search(600, trace=traced)
    assert sorted(set(seen)) == [2, 4]


def test_few_rows_and_pinned_ones_are_traced_as_they_are() -> None:
    seen: list[int] = []

    def traced(rows: int) -> ModelTrace:
        seen.append(rows)
        return trace(rows)

    assert search(10_000, trace=traced, rows=3).choice.micro_batch_size == 3
    assert set(seen) == {1, 3}
    seen.clear()
    assert search(10_000, trace=traced, micro_batch_size=8).choice.micro_batch_size == 8
    assert set(seen) == {8}


def test_pinned_policies_stay() -> None:
    pinned = ("full", "none", "full", "none")
    assert search(10_000, recompute=pinned).choice.recompute == pinned


def test_what_is_found_to_hold_more_is_searched_again() -> None:
    asked: list[Choice] = []
    plain = module()

    def exact(choice: Choice) -> MemoryReport:
        asked.append(choice)
        return MemoryReport({"activations": Prices(plain).held_bytes(choice) + 100 * MIB})

    found = search(700, exact=exact)
    assert found.memory.device_bytes_peak <= 700 * MIB + BESIDE
    assert len(asked) > 1 and asked[0] != found.choice


def test_neighbours_lose_for_a_reason() -> None:
    found = search(600)
    reasons = {str(entry.different): entry.reason for entry in found.rejected}
    assert "over the budget" in reasons["{'recompute': 'none'}"]
    assert "slower" in reasons["{'recompute': 'full'}"]
    assert "slower" in reasons["{'micro_batch_size': 8}"]


def test_more_recomputation_is_offered_with_its_price() -> None:
    changes = {change["change"]: change for change in search(10_000).changes}
    assert set(changes) == {"recompute=selective", "recompute=full"}
    assert changes["recompute=full"]["bytes"] < changes["recompute=selective"]["bytes"] < 0
    assert changes["recompute=full"]["tokens_per_second"] < changes["recompute=selective"]["tokens_per_second"] < 0


def test_what_cannot_fit_says_by_how_much() -> None:
    with pytest.raises(
        DoesNotFit, match=r"Net: a memory budget of .* less than the least it needs, .* micro-batches of 1"
    ):
        search(30)
    with pytest.raises(DoesNotFit) as caught:
        search(30)
    assert 0 < caught.value.over_bytes < 20 * MIB


def test_stages_of_zero_trade_weights_for_sending() -> None:
    many = module(world_size=8)
    parts = trace(4)
    by_stage = [
        sharding_bytes(many, parts, Choice(4, 4, ("none",) * BLOCKS, stage, 8 if not stage else 1))
        for stage in range(4)
    ]
    assert by_stage[0]["weights"] == by_stage[0]["optimizer_state"] == 0
    assert by_stage[1]["optimizer_state"] == -14 * MIB and by_stage[1]["gradients"] == 0
    assert by_stage[2]["gradients"] == by_stage[3]["gradients"] == -7 * MIB
    assert by_stage[3]["communication"] == 6 * MIB < by_stage[2]["communication"] == 10 * MIB
    assert sharding_bytes(module(), parts, Choice(4, 4, ("none",) * BLOCKS, 3)) == {}


def test_ranks_are_searched_for_stages() -> None:
    found = search(10_000, world_size=8, sending=lambda choice, forward, backward: float(choice.zero_stage))
    assert found.choice.zero_stage == 0 and found.choice.replicate == 8
    tight = search(80, world_size=8, micro_batch_size=1, recompute=("full",) * BLOCKS)
    assert tight.memory.allocated_bytes_peak <= 80 * MIB
