"""Both halves of a step: each alone, the calls at which they meet, and their sum."""

from __future__ import annotations

from typing import Any

import pytest

from bigtrain.config.load import load_recipe
from bigtrain.config.model import ModelConfig, resolve_model
from bigtrain.config.schema import Recipe
from bigtrain.ledger import Ledger
from bigtrain.memory.predict import Step, predict
from bigtrain.memory.tape import BOUNDARIES, Kept, Moment, Part, Passes, kept, moments, passes
from bigtrain.models.operations_cost import LONG

MACHINE: dict[str, Any] = {"device": "cpu", "slow_bf16": False, "threads": 1}
CUDA: dict[str, Any] = {"device": "cuda", "slow_bf16": False, "threads": 1, "workspace_bytes": 2**20}

LENGTH, MICRO_BATCH_SIZE, BLOCKS = 32, 2, 3


def built(*overrides: str) -> tuple[Recipe, ModelConfig]:
    """Return a recipe of two micro-batches for one rank, nothing of it open, and its model."""
    keys = (
        "model.hidden_size=32", f"model.num_hidden_layers={BLOCKS}", "model.num_attention_heads=2",
        "data.vocab_size=600", f"data.sequence_length={LENGTH}", f"train.micro_batch_size={MICRO_BATCH_SIZE}",
        "train.global_batch_size=4", "train.max_grad_norm=null", "train.compile=false", "memory.budget=8GiB",
        "recompute.policy=none", "sharding.zero_stage=0", "sharding.replicate=1", "sharding.offload=none",
        "model.preset=null",
    )  # fmt: skip
    recipe = load_recipe("quickstart_gpt", [*keys, *overrides])
    return recipe, resolve_model(recipe.model, vocab_size=600, sequence_length=LENGTH)


def halves(*overrides: str, world_size: int = 1, **machine: Any) -> tuple[Passes, Kept]:
    recipe, model = built(*overrides)
    where = (machine or MACHINE) | {"world_size": world_size}
    passing = passes(recipe, model, **where)
    return passing, kept(passing.calls, recipe, model, **where)


def test_calls_come_in_the_order_of_a_step() -> None:
    calls = [(call.kind, call.block) for call in halves()[0].calls if call.kind != "gradient"]
    forward = [(kind, block) for block in range(BLOCKS) for kind in ("before_forward", "after_forward")]
    backward = [(kind, block) for block in (2, 1, 0) for kind in ("before_backward", "after_backward")]
    assert calls == [("enter", 0), *forward, ("turn", 0), *backward, ("finish", 0)]


@pytest.mark.parametrize("policy", ["selective", "full", "offload"])
def test_calls_are_the_same_under_all_policies_and_for_all_micro_batches(policy: str) -> None:
    plain = passes(*built(), **MACHINE)
    assert passes(*built(f"recompute.policy={policy}"), **MACHINE).calls == plain.calls
    assert passes(*built("train.micro_batch_size=4"), **MACHINE).calls == plain.calls


def test_each_parameter_has_its_gradient_between_the_calls_of_its_block() -> None:
    recipe, model = built()
    inside: int | None = None
    found = {}
    for call in passes(recipe, model, **MACHINE).calls:
        if call.kind == "before_backward":
            inside = call.block
        elif call.kind == "after_backward":
            inside = None
        elif call.kind == "gradient":
            found[call.name] = call.size
            assert call.name.startswith(f"blocks.{inside}." if inside is not None else "") and call.size > 0
            assert call.name.startswith("blocks.") == (inside is not None)
    state = Step(recipe, model, Ledger(), **MACHINE)
    assert set(found) == set(state._shapes)


def test_the_passes_leave_the_batch_and_nothing_else() -> None:
    passing, _ = halves()
    batch = 3 * MICRO_BATCH_SIZE * LENGTH * LONG
    assert passing.parts[0] == Part(batch, batch)
    assert sum(part.added for part in passing.parts) == batch


def test_who_keeps_a_model_that_is_not_sharded_holds_gradients_as_they_come() -> None:
    passing, keeping = halves()
    first, second = keeping.parts
    for call, part, again in zip(passing.calls, first, second, strict=True):
        assert part == Part(call.size, call.size)
        assert again == Part(0, call.size)
    assert keeping.held > sum(call.size for call in passing.calls)  # weights, and two states for each


def test_gradients_that_are_released_are_used_and_let_go_of() -> None:
    released = ("optimizer.gradient_release=true", "train.global_batch_size=2")
    passing, keeping = halves(*released)
    (parts,) = keeping.parts
    for call, part in zip(passing.calls, parts, strict=True):
        assert part.added == 0
        assert part.most >= call.size
    assert keeping.update == Part(0, 0)


def test_what_is_held_for_one_block_more() -> None:
    few = halves()[1]
    assert halves("model.num_hidden_layers=4")[1].held - few.held == few.block_bytes > 0


def test_stage_3_gathers_and_lets_go() -> None:
    passing, keeping = halves("sharding.zero_stage=3", "train.global_batch_size=8", world_size=4)
    first = keeping.parts[0]
    after = [part.added for call, part in zip(passing.calls, first, strict=True) if call.kind == "after_forward"]
    assert all(added < 0 for added in after)
    assert keeping.held * 3.9 < halves("sharding.zero_stage=0", "train.global_batch_size=8")[1].held * 1.1


def test_the_workspace_of_matrix_products_is_counted_once_for_each_thread() -> None:
    with_it, without = halves(**CUDA), halves(**CUDA | {"workspace_bytes": 0})
    assert with_it[0] == without[0]
    assert with_it[1].held - without[1].held == 2 * 2**20


def test_the_sum_is_counted_by_hand() -> None:
    calls = passes(*built(), **MACHINE).calls[:2]
    assert [call.kind in BOUNDARIES for call in calls] == [False, True]
    passing = Passes(calls, (Part(5, 6), Part(10, 30)))
    keeping = Kept(100, 0, ((Part(7, 40), Part(1, 2)), (Part(0, 0), Part(0, 50))), (0, 0), Part(-3, 60))
    assert moments(passing, keeping) == [
        Moment(100 + 5 + 7 + 10, 100 + 5 + 40),
        Moment(122 + 1, 122 + 2),
        Moment(123 + 0 + 10, 123 + 30),
        Moment(133, 133 + 50),
        Moment(133, 133 + 60),
    ]


@pytest.mark.parametrize("stage", [0, 1, 2, 3])
@pytest.mark.parametrize("steps", [1, 2, 4])
@pytest.mark.parametrize("machine", [MACHINE, CUDA], ids=["cpu", "cuda"])
def test_the_most_of_the_sum_is_the_peak_of_a_whole_step(stage: int, steps: int, machine: dict[str, Any]) -> None:
    ranks = 4 if stage else 1
    overrides = (f"sharding.zero_stage={stage}", f"train.global_batch_size={MICRO_BATCH_SIZE * ranks * steps}")
    recipe, model = built(*overrides)
    most = max(moment.most for moment in moments(*halves(*overrides, world_size=ranks, **machine)))
    assert most == predict(recipe, model, world_size=ranks, **machine).allocated_bytes_peak
