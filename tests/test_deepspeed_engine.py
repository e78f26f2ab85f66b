"""The same run under DeepSpeed: the loop of an engine, its losses and norms, and checkpoints that cross both ways."""

from __future__ import annotations

import importlib.util
import json
from pathlib import Path
from typing import Any

import pytest
import rank_deepspeed
import torch
from rank_deepspeed import FIRST, SECOND
from rank_run import LENGTH, ROWS, VOCABULARY, follow, told_by_first

import bigtrain
from bigtrain.config.schema import Recipe
from bigtrain.deepspeed_engine import DeepSpeedEngine, prepare
from bigtrain.errors import RecipeError
from bigtrain.planner import hardware
from bigtrain.training.build import build_plan_model

WORLD_SIZE = 2
TOLERANCE = 1e-4

needed = pytest.mark.skipif(importlib.util.find_spec("deepspeed") is None, reason="DeepSpeed is not installed")

CASES: dict[str, dict[str, Any]] = {
    "stage 1": {"family": "gpt", "sharding": {"zero_stage": 1}},
    "stage 3": {"family": "bert", "sharding": {"zero_stage": 3}, "recompute": {"policy": "full"}},
}


def recipe_of(case: dict[str, Any], world: int = WORLD_SIZE) -> Recipe:
    """Return a small fp32 recipe without dropout; 90 rows and a width of 36 and 71 do not all divide."""
    family, sharding = case["family"], {"replicate": 1, "offload": "none", **case["sharding"]}
    sections: dict[str, Any] = {
        "model": {
            "family": family,
            "hidden_size": 36,
            "num_hidden_layers": 2,
            "num_attention_heads": 4,
            "intermediate_size": 71,
        },
        "data": {"vocab_size": VOCABULARY, "sequence_length": LENGTH},
        "train": {
            "objective": "mlm" if family == "bert" else "clm",
            "steps": 30,
            "global_batch_size": ROWS,
            "micro_batch_size": 2,
            "dropout": 0.0,
            "compile": False,
            "device": "cpu",
        },
        "optimizer": {"learning_rate": 3e-3, "warmup_steps": 3, "weight_decay": 0.1},
        "amp": {"precision": "fp32"},
        "recompute": case.get("recompute", {"policy": "none"}),
        "memory": {"budget": "1GiB"},
        "sharding": sharding if world > 1 else {},
        "cluster": {"devices_per_node": world},
    }
    return Recipe.model_validate({"name": "deepspeed", **sections})


@pytest.fixture(scope="module")
def found(tmp_path_factory: pytest.TempPathFactory) -> dict[str, dict[str, Any]]:
    """Return what the first of two ranks found, by case."""
    folder = tmp_path_factory.mktemp("crossing")
    cases = folder / "cases.json"
    cases.write_text(json.dumps([str(folder), [recipe_of(case).model_dump(mode="json") for case in CASES.values()]]))
    told = told_by_first(Path(rank_deepspeed.__file__), cases, WORLD_SIZE)
    return dict(zip(CASES, told, strict=True))


def near(one: Any, two: Any) -> None:
    for (loss, norm), (other_loss, other_norm) in zip(one, two, strict=True):
        assert loss == pytest.approx(other_loss, rel=TOLERANCE)
        assert norm == pytest.approx(other_norm, rel=TOLERANCE)


@needed
@pytest.mark.slow
@pytest.mark.parametrize("name", CASES)
def test_a_run_goes_on_under_the_other_engine(name: str, found: dict[str, dict[str, Any]]) -> None:
    near(found[name]["middle"]["deep"], found[name]["middle"]["plain"])
    near(found[name]["end"]["deep"], found[name]["end"]["plain"])
    near(found[name]["end"]["back"], found[name]["end"]["plain"])


@needed
@pytest.mark.slow
@pytest.mark.parametrize("name", CASES)
def test_under_deepspeed_it_goes_on_bitwise(name: str, found: dict[str, dict[str, Any]]) -> None:
    assert found[name]["end"]["again"] == found[name]["end"]["deep"]


@needed
@pytest.mark.slow
@pytest.mark.parametrize("name", CASES)
def test_ranks_learn_what_one_process_learns(name: str, found: dict[str, dict[str, Any]]) -> None:
    alone = follow(recipe_of(CASES[name], world=1), FIRST + SECOND)
    pairs = list(zip(alone["losses"], alone["norms"], strict=True))
    near(found[name]["fresh"], pairs[:SECOND])
    near(found[name]["middle"]["deep"], pairs[FIRST:])


@needed
@pytest.mark.slow
@pytest.mark.parametrize("name", CASES)
def test_its_checkpoints_are_those_of_two_ranks(name: str, found: dict[str, dict[str, Any]]) -> None:
    names = found[name]["files"]
    assert [file for file in names if file.startswith("weights")] == [
        "weights-00000-of-00002.safetensors",
        "weights-00001-of-00002.safetensors",
    ]
    assert sum(file.startswith("optimizer") for file in names) == WORLD_SIZE


@needed
@pytest.mark.parametrize(("section", "key", "value"), [("optimizer", "name", "lamb"), ("train", "compile", True)])
def test_what_deepspeed_cannot_do_is_refused_before_anything_is_made(section: str, key: str, value: object) -> None:
    recipe = recipe_of(CASES["stage 1"], world=1)
    plan = bigtrain.plan(recipe, hardware.cpu())
    sections = {
        "sharding": plan.recipe.sharding.model_copy(update={"engine": "deepspeed", "zero_stage": 1}),
    }
    changed = plan.recipe.model_copy(update=sections)
    changed = changed.model_copy(update={section: getattr(changed, section).model_copy(update={key: value})})
    with torch.device("meta"):
        model = build_plan_model(plan)
    with pytest.raises(RecipeError, match=f"{section}.{key}: .* does not go with sharding.engine=deepspeed"):
        prepare(model, _with(plan, changed), torch.optim.AdamW)
    assert next(model.parameters()).is_meta


def _with(plan: Any, recipe: Recipe) -> Any:
    import dataclasses

    return dataclasses.replace(plan, recipe=recipe)


def test_it_is_an_engine() -> None:
    assert issubclass(DeepSpeedEngine, bigtrain.Engine)
