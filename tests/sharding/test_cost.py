"""Which rank has how much, and what it sends."""

from __future__ import annotations

import math
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st

from bigtrain.config.schema import Recipe
from bigtrain.sharding.cost import (
    STAGES,
    Collective,
    Layout,
    collectives,
    local_shape,
    padded_elements,
    shard_bytes,
    tensor_sums,
)

SHAPES = st.lists(st.integers(1, 50), min_size=1, max_size=3).map(tuple)
SHARDS = st.integers(1, 64)


def rows_of(shape: tuple[int, ...], shards: int, rank: int) -> int:
    """Return the rows that torch.chunk, which `fully_shard` cuts with, gives a rank."""
    each = -(-shape[0] // shards)
    return max(0, min(each, shape[0] - rank * each))


@given(SHAPES, SHARDS)
def test_the_ranks_have_everything_and_the_padding(shape: tuple[int, ...], shards: int) -> None:
    row = math.prod(shape[1:])
    held = [rows_of(shape, shards, rank) * row for rank in range(shards)]
    assert sum(held) == math.prod(shape)
    assert max(held) == held[0] == math.prod(local_shape(shape, shards))
    padding = shards * held[0] - math.prod(shape)
    assert 0 <= padding < shards * row
    assert padded_elements(shape, shards) == math.prod(shape) + padding


@given(st.lists(SHAPES, max_size=5), SHARDS, st.sampled_from([1, 2, 4]))
def test_more_shards_hold_no_more(shapes: list[tuple[int, ...]], shards: int, number_bytes: int) -> None:
    held = [shard_bytes(shapes, count, number_bytes) for count in (1, shards, 2 * shards)]
    assert held[0] == number_bytes * sum(math.prod(shape) for shape in shapes)
    assert held == sorted(held, reverse=True)


def test_a_scalar_is_not_cut() -> None:
    assert local_shape((), 8) == ()
    assert padded_elements((), 1) == 1


def sent(stage: int, shards: int, replicate: int = 1, steps: int = 1) -> int:
    return sum(c.sent_bytes for c in collectives(10**6, stage, shards, replicate, steps, 4, 4))


@given(st.integers(2, 512))
def test_the_formulas_of_zero(ranks: int) -> None:
    all_reduce = sent(0, 1, ranks)
    assert all_reduce == pytest.approx(2 * 4 * 10**6 * (ranks - 1) / ranks, rel=1e-5)
    for stage, factor in ((1, 1), (2, 1), (3, 1.5)):
        assert sent(stage, ranks) == pytest.approx(factor * all_reduce, rel=1e-5)


@given(st.integers(2, 64), st.integers(2, 16))
def test_what_accumulation_costs(ranks: int, steps: int) -> None:
    once = [sent(stage, ranks) for stage in STAGES]
    several = [sent(stage, ranks, steps=steps) for stage in STAGES]
    assert several[1] == once[1]  # one gather, one reduction a step
    assert several[3] == steps * once[3]
    assert several[1] < several[2] < several[3]
    assert sent(0, 1, ranks, steps) == sent(0, 1, ranks)


def test_one_rank_sends_nothing() -> None:
    assert all(collectives(100, stage, 1, 1, 4, 2, 4) == [] for stage in STAGES)


def test_hybrid_sums_its_part_over_replicas() -> None:
    gather, scatter, reduce = collectives(1000, 3, 4, 2, 1, 2, 4)
    assert gather == Collective("all_gather", 2 * 2000 * 3 // 4, 4, "shard", 2, 2, forward_share=0.5)
    assert scatter == Collective("reduce_scatter", 4000 * 3 // 4, 4, "shard", 1, 1)
    assert reduce == Collective("all_reduce", 2 * 1000 // 2, 2, "replicate", 1, 1)


def recipe(stage: Any = 3, replicate: Any = 1, offload: str = "none", **amp: str) -> Recipe:
    sections = {
        "model": {"family": "gpt", "hidden_size": 64, "num_hidden_layers": 2, "num_attention_heads": 2},
        "data": {"sequence_length": 64},
        "train": {"objective": "clm", "global_batch_size": 32, "micro_batch_size": 2, "steps": 1},
        "optimizer": {"learning_rate": 1e-3},
        "amp": amp,
        "sharding": {"zero_stage": stage, "replicate": replicate, "offload": offload},
    }
    return Recipe.model_validate({"name": "layout", **sections})


def test_the_layout_of_a_recipe() -> None:
    layout = Layout.of(recipe(replicate=2, precision="bf16"), 8, kept_bytes=4)
    assert layout == Layout(3, shards=4, replicate=2, number_bytes=2, kept_bytes=4, accumulated=True)
    assert (layout.mesh, layout.converting, layout.resharding, layout.alone) == ((2, 4), True, True, False)


def test_stage_0_replicates_over_all_ranks() -> None:
    layout = Layout.of(recipe(stage=0), 8, kept_bytes=4)
    assert (layout.shards, layout.replicate, layout.mesh) == (1, 8, (8, 1))


@pytest.mark.parametrize("stage", [*STAGES, "auto"])
def test_one_rank_is_alone_at_any_stage(stage: Any) -> None:
    assert Layout.of(recipe(stage), 1, kept_bytes=4) == Layout.of(recipe(0), 1, kept_bytes=4)
    assert Layout.of(recipe(stage), 1, kept_bytes=4).alone


def test_bf16_weights_are_summed_in_fp32_over_micro_batches() -> None:
    narrow = [Layout.of(recipe(precision="bf16"), size, kept_bytes=2) for size in (4, 16)]
    assert [(layout.accumulated, layout.mesh) for layout in narrow] == [(True, (1, 4)), (False, (16,))]
    assert Layout.of(recipe(precision="bf16"), 4, kept_bytes=4).mesh == (4,)


def test_offload_keeps_on_the_device_what_computes() -> None:
    layout = Layout.of(recipe(offload="optimizer", precision="bf16"), 4, kept_bytes=4)
    assert (layout.kept_bytes, layout.converting, layout.streaming) == (2, False, False)
    streamed = Layout.of(recipe(offload="all"), 1, kept_bytes=4)
    assert streamed.streaming
    assert not streamed.alone


def test_nvme_counts_as_all() -> None:
    assert Layout.of(recipe(offload="nvme"), 4, kept_bytes=4) == Layout.of(recipe(offload="all"), 4, kept_bytes=4)


@given(st.integers(2, 64), st.integers(1, 8), st.integers(0, 900))
def test_what_is_outside_of_the_blocks_is_gathered_once_a_micro_batch(ranks: int, steps: int, outside: int) -> None:
    gather, scatter = collectives(1000 * ranks, 3, ranks, 1, steps, 1, 1, groups=4, outside=outside * ranks)
    assert gather.sent_bytes == steps * (2 * 1000 - outside) * (ranks - 1)
    assert gather.calls == steps * (2 * 4 - bool(outside))
    assert gather.forward_share * gather.sent_bytes == pytest.approx(steps * 1000 * (ranks - 1))
    assert scatter.calls == 4 * steps


def test_all_groups_are_counted() -> None:
    calls = {stage: [c.calls for c in collectives(1000, stage, 4, 2, 3, 4, 4, groups=5)] for stage in (1, 2, 3)}
    assert calls == {1: [5, 5, 5], 2: [5, 15, 5], 3: [30, 15, 5]}
    assert [c.calls for c in collectives(1000, 0, 1, 8, 3, 4, 4, groups=5)] == [5]


@pytest.mark.parametrize("ranks", [2, 8])
def test_ranks_that_share_products_sum_activations_four_times_a_block(ranks: int) -> None:
    (sums,) = tensor_sums(ranks, 1000, blocks=10, repeated=0, accumulation_steps=3)
    assert (sums.kind, sums.scope, sums.ranks, sums.calls) == ("all_reduce", "tensor", ranks, 3 * 4 * 10)
    assert sums.sent_bytes == sums.calls * 2 * (1000 * (ranks - 1) // ranks)
    assert sums.forward_share == 0.5
    (more,) = tensor_sums(ranks, 1000, blocks=10, repeated=10, accumulation_steps=3)
    assert (more.calls, more.forward_share) == (3 * 5 * 10, pytest.approx(2 / 5))
    assert tensor_sums(1, 1000, blocks=10, repeated=0, accumulation_steps=3) == []


def test_ranks_between_those_that_share_a_model_are_told() -> None:
    sent = collectives(1000, 3, 4, 2, 1, 2, 4, apart=8)
    assert [one.apart for one in sent if one.scope == "shard"] == [8, 8]
