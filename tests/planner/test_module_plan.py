"""The plan of a model that no recipe describes."""

from __future__ import annotations

import copy

import pytest

from bigtrain.errors import InputError
from bigtrain.memory.report import MemoryReport
from bigtrain.planner.choice import Choice
from bigtrain.planner.hardware import of_name
from bigtrain.planner.module_plan import ModulePlan, Undescribed, module_recipe
from bigtrain.planner.speed import StepSeconds

HARDWARE = of_name("cpu-laptop")


def plan(row_tokens: int = 12) -> ModulePlan:
    choice = Choice(4, 2, ("full", "none"))
    recipe = module_recipe(
        "Net",
        HARDWARE,
        global_batch_size=8,
        budget_bytes=2**30,
        precision="fp32",
        seed=3,
        causal=True,
        optimizer="adamw",
        learning_rate=3e-4,
    )
    return ModulePlan(
        recipe=choice.into(recipe),
        model=Undescribed("Net"),  # type: ignore[arg-type]
        hardware=HARDWARE,
        world_size=1,
        choice=choice,
        memory=MemoryReport({"weights": 100}),
        seconds=StepSeconds(1.0, 2.0, 0.5, 0.5),
        parameters=25,
        flops_per_token=150,
        mfu=0.1,
        rates_source="table",
        row_tokens=row_tokens,
    )


def test_an_engine_finds_what_it_reads() -> None:
    found = plan()
    assert (found.micro_batch_size, found.accumulation_steps) == (4, 2)
    recipe = found.recipe
    assert recipe.recompute.policy == ["full", "none"] and recipe.train.objective == "clm"
    assert recipe.seed == 3 and recipe.amp.precision == "fp32" and not recipe.train.compile
    assert recipe.optimizer.schedule == "constant" and not recipe.optimizer.gradient_release
    assert found.total_steps is None and found.budget_bytes == 2**30 and found.warnings == ()


def test_tokens_are_those_of_a_row() -> None:
    assert plan().tokens_per_step == 8 * 12 and plan().tokens_per_second == 8 * 12 / 4
    assert plan(row_tokens=1).tokens_per_step == 8


def test_it_prints_as_every_plan() -> None:
    found = plan().as_object()
    assert found["choice"]["recompute"] == ["full", "none"]  # type: ignore[index]
    assert found["memory"]["allocated_bytes_peak"] == 100  # type: ignore[index]


def test_it_is_no_recipe() -> None:
    with pytest.raises(InputError, match="the plan of a Net is no recipe"):
        plan().to_yaml()


def test_the_shape_of_a_recipes_model_is_refused_by_name() -> None:
    with pytest.raises(InputError, match="the plan of a Net has no head_dim: no recipe describes the model"):
        print(plan().model.head_dim)
    assert copy.copy(plan()).parameters == 25 and "Net" in repr(plan())
