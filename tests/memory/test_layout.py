"""The layout that a recipe stands for, and what sharding makes of a step's prediction."""

from __future__ import annotations

import math
from typing import Any

import pytest

from bigtrain.config.model import ModelConfig, resolve_model
from bigtrain.config.schema import Recipe
from bigtrain.memory.layout import layout_of, local_shapes, tensor_shapes
from bigtrain.memory.predict import predict
from bigtrain.memory.report import MemoryReport
from bigtrain.memory.state import model_state
from bigtrain.models.shape import parameter_shapes

ROWS = 32
"""The global batch: as many micro-batches of one row a rank as ranks leave."""

LOW = {"precision": "bf16"}


def recipe_of(stage: Any, replicate: int = 1, *, rows: int = ROWS, **edits: dict[str, Any]) -> Recipe:
    sections: dict[str, dict[str, Any]] = {
        "model": {"family": "gpt", "hidden_size": 64, "num_hidden_layers": 6, "num_attention_heads": 2},
        "data": {"vocab_size": 512, "sequence_length": 64},
        "train": {"objective": "clm", "global_batch_size": rows, "micro_batch_size": 1, "steps": 1},
        "optimizer": {"learning_rate": 1e-3, "state": "fp32", "gradient_release": False},
        "amp": {"precision": "fp32", "master_weights": "fp32"},
        "recompute": {"policy": "full"},
        "sharding": {"zero_stage": stage, "replicate": replicate, "offload": "none"},
        "memory": {"budget": "8GiB"},
    }
    return Recipe.model_validate({"name": "layout", **{k: {**v, **edits.get(k, {})} for k, v in sections.items()}})


def model_of(recipe: Recipe) -> ModelConfig:
    return resolve_model(recipe.model, vocab_size=512, sequence_length=64)


def report(recipe: Recipe, world_size: int, device: str = "cuda") -> MemoryReport:
    return predict(recipe, model_of(recipe), device=device, slow_bf16=False, world_size=world_size, threads=1)


def peaks(world_size: int, **options: Any) -> list[int]:
    return [report(recipe_of(stage, **options), world_size).allocated_bytes_peak for stage in range(4)]


@pytest.mark.parametrize("device", ["cpu", "cuda"])
@pytest.mark.parametrize("stage", [1, 2, 3])
def test_a_shard_of_one_does_nothing(stage: int, device: str) -> None:
    assert report(recipe_of(stage), 1, device) == report(recipe_of(0), 1, device)


@pytest.mark.parametrize(
    "amp", [{}, {"precision": "bf16"}, {"precision": "bf16", "master_weights": "split24"}], ids=str
)
def test_a_higher_stage_holds_less(amp: dict[str, str]) -> None:
    found = peaks(8, amp=amp)
    assert found == sorted(found, reverse=True)
    assert found[0] > found[1] > found[2] > found[3]


def test_one_micro_batch_makes_stages_1_and_2_the_same() -> None:
    found = peaks(8, rows=8)
    assert found[1] == found[2] > found[3]


@pytest.mark.parametrize("stage", [1, 2, 3])
def test_more_shards_hold_less(stage: int) -> None:
    found = [report(recipe_of(stage, rows=64), size).allocated_bytes_peak for size in (2, 4, 8, 16)]
    assert found == sorted(found, reverse=True)


def test_replicas_hold_what_their_shards_do() -> None:
    hybrid, shards = report(recipe_of(3, 4, rows=64), 16), report(recipe_of(3, rows=16), 4)
    assert hybrid.by_cause["weights"] == shards.by_cause["weights"]
    assert hybrid.by_cause["optimizer_state"] == shards.by_cause["optimizer_state"]


def test_state_is_cut_by_rows() -> None:
    recipe = recipe_of(3)
    whole, local = parameter_shapes(model_of(recipe)), local_shapes(recipe, model_of(recipe), 8)
    assert local["tokens.weight"] == (64, 64)
    assert local["final_norm.weight"] == (8,)
    state = model_state(recipe, model_of(recipe), accumulated=True, world_size=8)
    assert state["weights"] == state["gradients"] == 4 * sum(math.prod(shape) for shape in local.values())
    assert 8 * state["weights"] == 4 * sum(math.prod(shape) for shape in whole.values())  # all rows are divisible


def test_one_rank_keeps_whole_parameters() -> None:
    recipe = recipe_of("auto")
    assert local_shapes(recipe, model_of(recipe), 1) == parameter_shapes(model_of(recipe))


def test_low_precision_weights_are_kept_as_they_compute() -> None:
    kept = {"fp32": 4, "split24": 2, "none": 2}
    for weights, size in kept.items():
        layout = layout_of(recipe_of(3, amp={"precision": "bf16", "master_weights": weights}), 4)
        assert (layout.number_bytes, layout.kept_bytes, layout.converting) == (2, size, size == 4)


def test_what_a_plan_for_thousands_of_ranks_sees() -> None:
    found = report(recipe_of(3, 512, rows=4096), 4096)
    assert found.by_cause["weights"] * 8 == pytest.approx(report(recipe_of(0, rows=1), 1).by_cause["weights"], rel=0.01)
    assert found.by_cause["communication"] > 0


@pytest.mark.parametrize("stage", [0, 3])
def test_ranks_that_share_products_count_as_one_and_hold_parts(stage: int) -> None:
    recipe, shared = recipe_of(stage), recipe_of(stage, sharding={"tensor_parallel": 2})
    model = model_of(recipe)
    assert layout_of(shared, 8) == layout_of(recipe, 4)
    whole, mine = tensor_shapes(recipe, model), tensor_shapes(shared, model)
    in_blocks = [name for name in whole if name.startswith("blocks.") and "norm" not in name]
    kept = [name for name in in_blocks if name.endswith(("out.bias", "down.bias"))]
    for name in in_blocks:
        assert math.prod(mine[name]) == math.prod(whole[name]) // (1 if name in kept else 2)
    assert all(mine[name] == shape for name, shape in whole.items() if name not in in_blocks)
    shapes = local_shapes(shared, model, 8)
    assert sum(map(math.prod, shapes.values())) < sum(map(math.prod, local_shapes(recipe, model, 4).values()))


def test_shared_products_hold_less_of_a_step() -> None:
    recipe = recipe_of(0, recompute={"policy": "none"}, train={"micro_batch_size": 8})
    shared = recipe_of(0, recompute={"policy": "none"}, train={"micro_batch_size": 8}, sharding={"tensor_parallel": 2})
    model = model_of(recipe)
    one, two = (predict(r, model, device="cpu", slow_bf16=False, world_size=w) for r, w in ((recipe, 1), (shared, 2)))
    assert two.by_cause["activations"] < one.by_cause["activations"]
    assert two.allocated_bytes_peak < one.allocated_bytes_peak
