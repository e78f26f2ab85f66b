"""Composed peaks: what a whole step shows, to the byte, for every mix of policies and mechanisms."""

from __future__ import annotations

from typing import Any

import pytest
from hypothesis import assume, given, settings
from hypothesis import strategies as st

from bigtrain.config.load import load_recipe
from bigtrain.config.model import ModelConfig, resolve_model
from bigtrain.config.schema import Recipe
from bigtrain.memory.compose import Composer, Tapes, runs_of
from bigtrain.memory.predict import predict

PLAIN: dict[str, Any] = {
    "family": "bert",
    "num_hidden_layers": 4,
    "heads": 2,
    "sequence_length": 32,
    "micro_batch_size": 2,
    "accumulation_steps": 1,
    "policies": ("none",) * 4,
}
"""What a case is but for what it says otherwise."""

CPU: dict[str, Any] = {"device": "cpu", "slow_bf16": False, "threads": 2}
SLOW: dict[str, Any] = {"device": "cpu", "slow_bf16": True, "threads": 1}
CUDA: dict[str, Any] = {"device": "cuda", "slow_bf16": False, "workspace_bytes": 2**20}


def built(case: dict[str, Any], world_size: int = 1) -> tuple[Recipe, ModelConfig]:
    """Return the recipe of a case, nothing of it open, and its model."""
    case = PLAIN | case
    rows = case["micro_batch_size"] * case["accumulation_steps"] * world_size
    keys = {
        "model.family": case["family"],
        "model.preset": "null",
        "model.hidden_size": 16 * case["heads"],
        "model.num_hidden_layers": case["num_hidden_layers"],
        "model.num_attention_heads": case["heads"],
        "data.vocab_size": 600,
        "data.sequence_length": case["sequence_length"],
        "train.objective": "mlm" if case["family"] == "bert" else "clm",
        "train.micro_batch_size": case["micro_batch_size"],
        "train.global_batch_size": rows,
        "train.max_grad_norm": "null",
        "train.compile": "false",
        "memory.budget": case.get("budget", "8GiB"),
        "recompute.policy": f"[{','.join(case['policies'])}]",
        "sharding.zero_stage": case.get("zero_stage", 0),
        "sharding.replicate": case.get("replicate", world_size),
        "sharding.offload": case.get("offload", "none"),
    } | {key: value for key, value in case.items() if "." in key}
    recipe = load_recipe("quickstart_bert", [f"{key}={value}" for key, value in keys.items()])
    return recipe, resolve_model(recipe.model, vocab_size=600, sequence_length=case["sequence_length"])


def both(case: dict[str, Any], machine: dict[str, Any], world_size: int = 1) -> tuple[int, int]:
    """Return the composed peak and that of a whole step."""
    recipe, model = built(case, world_size)
    composed = Composer(recipe, model, world_size=world_size, **machine).peak_bytes(runs_of((PLAIN | case)["policies"]))
    return composed, predict(recipe, model, world_size=world_size, **machine).allocated_bytes_peak


MECHANISMS = st.fixed_dictionaries(
    {
        "family": st.sampled_from(("bert", "gpt", "llama")),
        "heads": st.sampled_from((2, 4)),
        "sequence_length": st.sampled_from((16, 32, 100)),
        "micro_batch_size": st.integers(1, 5),
        "accumulation_steps": st.integers(1, 4),
        "budget": st.sampled_from(("8GiB", "1MiB")),
        "train.dropout": st.sampled_from((0.0, 0.1)),
        "train.attention_dropout": st.sampled_from((0.0, 0.1)),
        "optimizer.name": st.sampled_from(("adamw", "lamb", "muon", "adafactor")),
        "optimizer.state": st.sampled_from(("fp32", "bf16", "8bit", "4bit")),
        "amp.precision": st.sampled_from(("fp32", "bf16")),
        "amp.master_weights": st.sampled_from(("fp32", "split24", "none")),
        "optimizer.gradient_release": st.booleans(),
    }
)


def possible(case: dict[str, Any]) -> dict[str, Any]:
    """Return the nearest case whose mechanisms go together."""
    case = dict(case)
    if case["optimizer.name"] == "adafactor":
        case["optimizer.state"] = "fp32"
    if case["amp.precision"] == "fp32":
        case["amp.master_weights"] = "fp32"
    released = case["optimizer.gradient_release"] and case["accumulation_steps"] == 1
    return case | {"optimizer.gradient_release": str(released).lower()}


def policies(*known: str) -> st.SearchStrategy[tuple[str, ...]]:
    """Return lists of policies for one to six blocks."""
    return st.lists(st.sampled_from(known), min_size=1, max_size=6).map(tuple)


@settings(max_examples=30, deadline=None)
@given(MECHANISMS, policies("none", "selective", "full"), st.sampled_from((CPU, SLOW)))
def test_on_a_cpu(case: dict[str, Any], blocks: tuple[str, ...], machine: dict[str, Any]) -> None:
    composed, whole = both(possible(case) | {"policies": blocks, "num_hidden_layers": len(blocks)}, machine)
    assert composed == whole


@settings(max_examples=20, deadline=None)
@given(MECHANISMS, policies("none", "selective", "full", "offload"))
def test_on_cuda_where_inputs_of_blocks_can_be_elsewhere(case: dict[str, Any], blocks: tuple[str, ...]) -> None:
    composed, whole = both(possible(case) | {"policies": blocks, "num_hidden_layers": len(blocks)}, CUDA)
    assert composed == whole


@settings(max_examples=30, deadline=None)
@given(
    MECHANISMS,
    policies("none", "selective", "full"),
    st.sampled_from((CPU, CUDA)),
    st.integers(0, 3),
    st.sampled_from((1, 2, 4, 8)),
    st.sampled_from((1, 2, 4, 8)),
    st.sampled_from(("none", "optimizer", "all")),
)
def test_with_sharding_and_state_on_the_host(
    case: dict[str, Any],
    blocks: tuple[str, ...],
    machine: dict[str, Any],
    stage: int,
    ranks: int,
    replicate: int,
    offload: str,
) -> None:
    assume(ranks % replicate == 0)
    layout = {"zero_stage": stage, "replicate": replicate if stage else ranks}
    layout["offload"] = offload if machine is CUDA else "none"
    composed, whole = both(
        possible(case) | layout | {"policies": blocks, "num_hidden_layers": len(blocks)}, machine, ranks
    )
    assert composed == whole


@pytest.mark.parametrize("blocks", [1, 2, 3, 24])
@pytest.mark.parametrize("policy", ["none", "selective", "full"])
def test_of_any_depth(blocks: int, policy: str) -> None:
    case = {"num_hidden_layers": blocks, "policies": (policy,) * blocks, "accumulation_steps": 2}
    composed, whole = both(case, CPU)
    assert composed == whole


def test_one_composer_has_all_mixes() -> None:
    recipe, model = built({})
    composer = Composer(recipe, model, **CPU)
    for mix in (("none",) * 4, ("full", "full", "none", "none"), ("selective", "none", "full", "none")):
        case, same = built({"policies": mix})
        assert composer.peak_bytes(runs_of(mix)) == predict(case, same, **CPU).allocated_bytes_peak
    assert len(composer.peaks) == 3


def test_the_order_of_policies_matters_to_what_is_held() -> None:
    recipe, model = built({"micro_batch_size": 5, "sequence_length": 100})
    composer = Composer(recipe, model, **CPU)
    early, late = (
        composer.peak_bytes(runs_of(mix))
        for mix in (("none", "none", "full", "full"), ("full", "full", "none", "none"))
    )
    assert late <= early


@pytest.mark.parametrize("family", ["bert", "gpt", "llama"])
@pytest.mark.parametrize("accumulation_steps", [1, 3])
def test_with_weights_that_come_block_by_block_under_mixed_policies(family: str, accumulation_steps: int) -> None:
    blocks = ("offload", "none", "full", "offload", "none", "selective")
    case = {"family": family, "policies": blocks, "num_hidden_layers": 6, "accumulation_steps": accumulation_steps}
    composed, whole = both(case | {"offload": "all", "replicate": 8, "amp.precision": "bf16"}, CUDA, 8)
    assert composed == whole


def test_choices_that_share_a_half_run_it_once() -> None:
    tapes = Tapes()
    mix = (("full", 2), ("none", 2))
    for stage in (1, 2, 3):
        recipe, model = built({"zero_stage": stage, "replicate": 1}, 4)
        composer = Composer(recipe, model, world_size=4, tapes=tapes, **CPU)
        case, _ = built({"zero_stage": stage, "replicate": 1, "policies": ("full", "full", "none", "none")}, 4)
        assert composer.peak_bytes(mix) == predict(case, model, world_size=4, **CPU).allocated_bytes_peak
    assert (len(tapes.passes), len(tapes.kept)) == (2, 3)
    recipe, model = built({"zero_stage": 3, "replicate": 1, "micro_batch_size": 4}, 4)
    case, _ = built({"zero_stage": 3, "replicate": 1, "micro_batch_size": 4, "policies": ("full",) * 4}, 4)
    held = Composer(recipe, model, world_size=4, tapes=tapes, **CPU).peak_bytes((("full", 4),))
    assert held == predict(case, model, world_size=4, **CPU).allocated_bytes_peak
    assert (len(tapes.passes), len(tapes.kept)) == (3, 3)


@settings(max_examples=20, deadline=None)
@given(MECHANISMS, policies("none", "selective", "full"), st.sampled_from((1, 2)))
def test_the_floor_is_below_every_mix(case: dict[str, Any], blocks: tuple[str, ...], ranks: int) -> None:
    layout = {"zero_stage": 3, "replicate": 1} if ranks > 1 else {}
    shape = {"policies": blocks, "num_hidden_layers": len(blocks)}
    recipe, model = built(possible(case) | layout | shape, ranks)
    composer = Composer(recipe, model, world_size=ranks, **CPU)
    assert composer.state_bytes <= composer.peak_bytes(runs_of(blocks))
    assert composer.turn_bytes(runs_of(blocks)) <= composer.peak_bytes(runs_of(blocks))
    assert composer.floor_bytes("full") <= composer.peak_bytes(runs_of(blocks))


def test_the_state_grows_with_each_block_alike() -> None:
    sizes = []
    for blocks in (4, 5, 6):
        recipe, model = built({"num_hidden_layers": blocks, "policies": ("none",) * blocks})
        sizes.append(Composer(recipe, model, **CPU).state_bytes)
    assert sizes[2] - sizes[1] == sizes[1] - sizes[0] > 0


def test_runs_are_equal_policies_in_a_row() -> None:
    assert runs_of(["full", "full", "none", "full"]) == (("full", 2), ("none", 1), ("full", 1))
    assert runs_of([]) == ()
