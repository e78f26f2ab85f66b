"""What the optimizer keeps, where it keeps it, and what its updates hold."""

from __future__ import annotations

import math
from typing import Any

import pytest

from bigtrain.config.model import ModelConfig, resolve_model
from bigtrain.config.schema import Recipe
from bigtrain.memory.layout import layout_of
from bigtrain.memory.predict import model_state, predict
from bigtrain.memory.state import (
    STAGED_ELEMENTS,
    Moved,
    host_bytes,
    is_matrix,
    matrices,
    moved_bytes,
    state_parts,
    update_bytes,
)
from bigtrain.models.shape import parameter_shapes

MATRIX, WHOLE = (64, 256), (256, 256)
LOW = {"precision": "bf16"}


def recipe_of(offload: str = "none", *, stage: int = 3, rows: int = 8, **edits: dict[str, Any]) -> Recipe:
    sections: dict[str, dict[str, Any]] = {
        "model": {"family": "gpt", "hidden_size": 64, "num_hidden_layers": 4, "num_attention_heads": 2},
        "data": {"vocab_size": 512, "sequence_length": 64},
        "train": {"objective": "clm", "global_batch_size": rows, "micro_batch_size": 1, "steps": 1},
        "optimizer": {"learning_rate": 1e-3, "state": "fp32", "gradient_release": False},
        "amp": {"precision": "fp32", "master_weights": "fp32"},
        "recompute": {"policy": "full"},
        "sharding": {"zero_stage": stage, "replicate": 1, "offload": offload},
        "memory": {"budget": "8GiB"},
    }
    return Recipe.model_validate({"name": "state", **{k: {**v, **edits.get(k, {})} for k, v in sections.items()}})


def model_of(recipe: Recipe) -> ModelConfig:
    return resolve_model(recipe.model, vocab_size=512, sequence_length=64)


def parameters(recipe: Recipe) -> int:
    return sum(math.prod(shape) for shape in parameter_shapes(model_of(recipe)).values())


def peak(recipe: Recipe, world_size: int = 1) -> int:
    model = model_of(recipe)
    return predict(recipe, model, device="cuda", slow_bf16=False, world_size=world_size).allocated_bytes_peak


def test_the_part_of_the_weights_comes_last() -> None:
    recipe = recipe_of(amp={**LOW, "master_weights": "split24"}, optimizer={"state": "8bit"})
    parts = state_parts(recipe, "blocks.0.mlp.up.weight", MATRIX)
    assert parts[-1] == (math.prod(MATRIX), "master_weights")
    assert {cause for _, cause in parts[:-1]} == {"optimizer_state"}
    assert all(cause == "optimizer_state" for _, cause in state_parts(recipe_of(), "tokens.weight", MATRIX))


def test_matrices_are_those_of_the_blocks() -> None:
    shapes = {"tokens.weight": MATRIX, "blocks.0.mlp.up.weight": MATRIX, "blocks.0.mlp.up.bias": (64,)}
    assert [is_matrix(name, shape) for name, shape in shapes.items()] == [False, True, False]
    assert matrices(shapes) == [1]


def test_muon_gathers_what_it_orthogonalises() -> None:
    recipe, name = recipe_of(optimizer={"name": "muon"}), "blocks.0.mlp.up.weight"
    layout = layout_of(recipe, 4)
    whole, part = (update_bytes(recipe, layout, name, shape, WHOLE, "cuda") for shape in (WHOLE, MATRIX))
    assert part - whole == 4 * math.prod(WHOLE)
    assert update_bytes(recipe, layout, "tokens.weight", MATRIX, WHOLE, "cuda") == 0


def test_without_offload_the_host_has_nothing() -> None:
    recipe = recipe_of()
    assert host_bytes(recipe, model_of(recipe), 1) == 0
    assert moved_bytes(recipe, model_of(recipe), 1, 4) == Moved(0, 0)


def test_states_and_masters_go_to_the_host() -> None:
    for amp, number in (({}, 4), (LOW, 2)):
        recipe = recipe_of("optimizer", rows=1, amp=amp)
        model, count = model_of(recipe), parameters(recipe)
        states = 8 * count + 4 * len(parameter_shapes(model)) + (4 * count if number == 2 else 0)
        assert host_bytes(recipe, model, 1) == states
        assert moved_bytes(recipe, model, 1, 4) == Moved(states, states)
        found = model_state(recipe, model, accumulated=False)
        assert found == {
            "weights": number * count,
            "master_weights": 0,
            "gradients": number * count,
            "optimizer_state": 0,
        }


def test_all_streams_weights_and_gradients() -> None:
    recipe = recipe_of("all", rows=2)
    model, count = model_of(recipe), parameters(recipe)
    states = 8 * count + 4 * len(parameter_shapes(model))
    assert host_bytes(recipe, model, 1) == states + 8 * count
    once, twice = (moved_bytes(recipe, model, 1, steps) for steps in (1, 2))
    assert once == Moved(states + 12 * count, states + 8 * count)
    assert (twice.to_device_bytes - once.to_device_bytes, twice.to_host_bytes - once.to_host_bytes) == (
        8 * count,
        4 * count,
    )
    assert set(model_state(recipe, model, accumulated=True).values()) == {0}


@pytest.mark.parametrize("world_size", [1, 8])
@pytest.mark.parametrize("amp", [{}, LOW], ids=str)
def test_each_offload_leaves_less_on_the_device(world_size: int, amp: dict[str, str]) -> None:
    model = {"hidden_size": 256}
    recipes = [recipe_of(kind, amp=amp, model=model) for kind in ("none", "optimizer", "all")]
    none, optimizer, streamed = (peak(recipe, world_size) for recipe in recipes)
    assert none > optimizer > streamed


def test_large_states_visit_the_device_in_parts() -> None:
    recipe = recipe_of("optimizer")
    layout, large = layout_of(recipe, 1), (4 * STAGED_ELEMENTS, 1)
    assert update_bytes(recipe, layout, "tokens.weight", large, large, "cuda") == 2 * (8 * STAGED_ELEMENTS + 1)
    small = (16, 16)
    assert update_bytes(recipe, layout, "tokens.weight", small, small, "cuda") == 2 * (8 * 256 + 4)


def test_a_norm_of_the_update_needs_all_of_it() -> None:
    recipe = recipe_of("optimizer", optimizer={"name": "lamb"})
    layout, large = layout_of(recipe, 1), (4 * STAGED_ELEMENTS, 1)
    assert update_bytes(recipe, layout, "tokens.weight", large, large, "cuda") >= 2 * 8 * 4 * STAGED_ELEMENTS
