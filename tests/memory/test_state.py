"""What the optimizer keeps, where it keeps it, and what its updates hold."""

from __future__ import annotations

import math
from typing import Any

import pytest

from bigtrain.config.model import ModelConfig, resolve_model
from bigtrain.config.schema import Recipe
from bigtrain.memory.layout import layout_of
from bigtrain.memory.predict import predict
from bigtrain.memory.state import (
    Moved,
    device_parts,
    gathered_bytes,
    host_bytes,
    is_matrix,
    matrices,
    model_state,
    moved_bytes,
    saved_bytes,
    state_parts,
    update_bytes,
)
from bigtrain.models.shape import parameter_shapes
from bigtrain.optim.cost import PIECE_ELEMENTS

PIECE = PIECE_ELEMENTS["cuda"]
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


def test_muon_has_a_whole_matrix_and_rows_of_one_for_each_rank() -> None:
    recipe, name = recipe_of(optimizer={"name": "muon"}), "blocks.0.mlp.up.weight"
    alone, layout = (layout_of(recipe, ranks) for ranks in (1, 4))
    dealt = update_bytes(recipe, layout, name, MATRIX, WHOLE, "cuda")
    assert dealt - update_bytes(recipe, alone, name, WHOLE, WHOLE, "cuda") == 4 * math.prod(MATRIX) * layout.shards
    assert update_bytes(recipe, layout, "tokens.weight", MATRIX, WHOLE, "cuda") == 0


def test_without_offload_the_host_has_nothing() -> None:
    recipe = recipe_of()
    assert host_bytes(recipe, model_of(recipe), 1) == 0
    assert moved_bytes(recipe, model_of(recipe), 1, 4) == Moved(0, 0)


def test_states_and_masters_go_to_the_host() -> None:
    for amp, number in (({}, 4), (LOW, 2)):
        recipe = recipe_of("optimizer", rows=1, amp=amp)
        model, count = model_of(recipe), parameters(recipe)
        states = 8 * count + (4 * count if number == 2 else 0)
        assert host_bytes(recipe, model, 1) == states
        assert moved_bytes(recipe, model, 1, 4) == Moved(states, states)
        found = model_state(recipe, model, accumulated=False)
        assert found == {
            "weights": number * count,
            "master_weights": 0,
            "gradients": number * count,
            "optimizer_state": 4 * len(parameter_shapes(model)),  # the step counts
        }
        here = model_state(recipe, model, accumulated=False, device="cpu")
        assert here["optimizer_state"] + here["master_weights"] == states + 4 * len(parameter_shapes(model))


def test_all_streams_weights_and_gradients() -> None:
    recipe = recipe_of("all", rows=2)
    model, count = model_of(recipe), parameters(recipe)
    sizes = [4 * math.prod(shape) for shape in parameter_shapes(model).values()]
    rounded = sum(2 ** math.ceil(math.log2(size)) for size in sizes)
    assert host_bytes(recipe, model, 1) == 12 * count + rounded
    blocks = sum(math.prod(shape) for name, shape in parameter_shapes(model).items() if name.startswith("blocks."))
    passes = 4 * (count + blocks)  # blocks come for both passes, what is outside of them once
    once, twice = (moved_bytes(recipe, model, 1, steps) for steps in (1, 2))
    assert once == Moved(16 * count + passes, 16 * count)
    assert twice == Moved(16 * count + 2 * passes, 20 * count)
    assert [gathered_bytes(recipe, model, 1, steps) for steps in (1, 2)] == [passes, 2 * passes]
    state = model_state(recipe, model, accumulated=True)
    assert (state["weights"], state["gradients"], state["optimizer_state"]) == (0, 0, 4 * len(sizes))


def test_fp32_masters_that_stream_are_the_weights() -> None:
    narrow, wide = (recipe_of("all", amp=amp) for amp in (LOW, {}))
    assert host_bytes(narrow, model_of(narrow), 1) == host_bytes(wide, model_of(wide), 1)
    assert peak(narrow) < peak(wide)


@pytest.mark.parametrize(("stage", "gathers"), [(1, 1), (2, 1), (3, 5)])
def test_what_stays_gathered_comes_once(stage: int, gathers: int) -> None:
    recipe = recipe_of("all", stage=stage, rows=24)
    name, shape = "tokens.weight", (512, 64)
    layout = layout_of(recipe, 8)
    assert layout.resharding == (gathers > 1)
    more, once = (moved_bytes(recipe, model_of(recipe), 8, steps) for steps in (5, 1))
    assert (more.to_device_bytes == once.to_device_bytes) == (gathers == 1)
    assert (more.to_host_bytes == once.to_host_bytes) == (stage == 1)
    assert device_parts(recipe, layout, name, shape, "cuda") == [(4, "optimizer_state")]


def test_lamb_reads_twice_what_it_changes_once() -> None:
    once, twice = (recipe_of("optimizer", optimizer={"name": name}) for name in ("adamw", "lamb"))
    model = model_of(once)
    plain, lamb = (moved_bytes(recipe, model, 1, 1) for recipe in (once, twice))
    assert lamb == Moved(2 * plain.to_device_bytes, plain.to_host_bytes)


def test_rows_and_columns_stay_on_the_device() -> None:
    recipe = recipe_of("optimizer", optimizer={"name": "adafactor"}, amp={**LOW, "master_weights": "split24"})
    layout, count = layout_of(recipe, 1), parameters(recipe)
    assert host_bytes(recipe, model_of(recipe), 1) == count  # the remainders
    parts = device_parts(recipe, layout, "tokens.weight", MATRIX, "cuda")
    assert parts == state_parts(recipe, "tokens.weight", MATRIX)[:-1]


@pytest.mark.parametrize("world_size", [1, 8])
@pytest.mark.parametrize("amp", [{}, LOW], ids=str)
def test_each_offload_leaves_less_on_the_device(world_size: int, amp: dict[str, str]) -> None:
    model = {"hidden_size": 256}
    recipes = [recipe_of(kind, amp=amp, model=model) for kind in ("none", "optimizer", "all")]
    none, optimizer, streamed = (peak(recipe, world_size) for recipe in recipes)
    assert none > optimizer > streamed


@pytest.mark.parametrize("name", ["adamw", "lamb"])
def test_large_states_visit_the_device_in_parts(name: str) -> None:
    recipe = recipe_of("optimizer", optimizer={"name": name})
    layout, large = layout_of(recipe, 1), (4 * PIECE, 1)
    assert update_bytes(recipe, layout, "tokens.weight", large, large, "cuda") == 2 * 8 * PIECE
    small = (16, 15)
    assert update_bytes(recipe, layout, "tokens.weight", small, small, "cuda") == 2 * 2 * 1024


def test_what_visits_is_what_is_on_the_host() -> None:
    large = (PIECE, 2)
    every = {"amp": {**LOW, "master_weights": "split24"}, "optimizer": {"state": "8bit"}}
    for offload, bytes_each in (("optimizer", 1 + 2), ("all", 1 + 2 + 2 + 2)):
        recipe = recipe_of(offload, **every)
        scales = 2 * 4 * PIECE // 256
        held = update_bytes(recipe, layout_of(recipe, 1), "tokens.weight", large, large, "cuda")
        assert held == 2 * (bytes_each * PIECE + scales)


def test_masters_visit_where_the_device_has_narrow_weights() -> None:
    large = (PIECE, 2)
    sizes = [
        update_bytes(recipe, layout_of(recipe, 1), "tokens.weight", large, large, "cuda")
        for recipe in (recipe_of("optimizer"), recipe_of("optimizer", amp=LOW))
    ]
    assert sizes == [2 * 8 * PIECE, 2 * 12 * PIECE]


def test_a_checkpoint_is_weights_or_wider_masters_and_states() -> None:
    plain = recipe_of()
    model, count = model_of(plain), parameters(plain)
    tensors = len(parameter_shapes(model))
    assert saved_bytes(plain, model) == 12 * count + 4 * tensors
    assert saved_bytes(recipe_of("optimizer", amp=LOW), model) == saved_bytes(plain, model)
    lean = recipe_of(amp=LOW | {"master_weights": "split24"}, optimizer={"name": "adafactor"})
    assert 3 * count < saved_bytes(lean, model) < 3.2 * count
    assert saved_bytes(plain, model) / 4 <= saved_bytes(plain, model, 4) < saved_bytes(plain, model) / 3
