"""One prepare() for both engines: which library shards is the plan's to say."""

from __future__ import annotations

import dataclasses
from functools import partial
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch

import bigtrain
from bigtrain import engine, preparation
from bigtrain.training.build import build_plan_model


@pytest.fixture
def plan(tiny_recipes: dict[str, Path]) -> Any:
    return bigtrain.plan(bigtrain.load_recipe(tiny_recipes["gpt"]))


def under(plan: Any, name: str) -> Any:
    sharding = plan.recipe.sharding.model_copy(update={"engine": name})
    return dataclasses.replace(plan, recipe=plan.recipe.model_copy(update={"sharding": sharding}))


def test_it_is_the_public_one() -> None:
    assert bigtrain.prepare is preparation.prepare


def test_plain_plans_get_our_engine(plan: Any) -> None:
    assert plan.recipe.sharding.engine == "fsdp2"
    with torch.device("meta"):
        model = build_plan_model(plan)
    prepared = bigtrain.prepare(model, plan, partial(torch.optim.AdamW, lr=1e-3))
    assert type(prepared) is engine.Engine and prepared.model is model


def test_plans_for_deepspeed_get_its_engine(plan: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    asked: list[tuple[Any, ...]] = []

    def prepare(*arguments: Any, **options: Any) -> str:
        asked.append((*arguments, options))
        return "of deepspeed"

    monkeypatch.setitem(__import__("sys").modules, "bigtrain.deepspeed_engine", SimpleNamespace(prepare=prepare))
    monkeypatch.setattr(bigtrain, "deepspeed_engine", SimpleNamespace(prepare=prepare), raising=False)
    model, factory, blocks = torch.nn.Linear(2, 2), partial(torch.optim.AdamW, lr=1e-3), torch.nn.Linear
    chosen = under(plan, "deepspeed")
    found: Any = bigtrain.prepare(model, chosen, factory, blocks=blocks)
    assert found == "of deepspeed"
    assert asked == [(model, chosen, factory, {"blocks": blocks})]


def test_errors_are_those_of_the_engine(plan: Any) -> None:
    other = dataclasses.replace(plan, world_size=2)
    with pytest.raises(bigtrain.InputError, match="the plan is for 2 ranks, and here are 1"):
        bigtrain.prepare(torch.nn.Linear(2, 2), other, partial(torch.optim.AdamW, lr=1e-3))
