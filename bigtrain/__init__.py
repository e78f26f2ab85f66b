"""Pretrain BERT- and GPT-class models in the least memory, at the highest speed, on what you have.

recipe = bigtrain.load_recipe("recipes/bert_large.yaml", ["train.steps=10"])
plan = bigtrain.plan(recipe)
bigtrain.train(plan, "runs/x")
"""

from __future__ import annotations

import importlib
from typing import TYPE_CHECKING, Any

from bigtrain.errors import (
    BigtrainError,
    CheckpointError,
    DataError,
    DoesNotFit,
    InputError,
    Interrupted,
    RecipeError,
    ResumeError,
)

if TYPE_CHECKING:
    from bigtrain.config.load import load_recipe
    from bigtrain.config.schema import Recipe
    from bigtrain.engine import Engine
    from bigtrain.launcher import launch
    from bigtrain.planner.plan import Plan, plan
    from bigtrain.planning_model import plan_model
    from bigtrain.preparation import prepare
    from bigtrain.profiling import profile
    from bigtrain.step_result import StepResult
    from bigtrain.training.loop import train
    from bigtrain.world import joined

__version__ = "0.1.0"

__all__ = [
    "BigtrainError",
    "CheckpointError",
    "DataError",
    "DoesNotFit",
    "Engine",
    "InputError",
    "Interrupted",
    "Plan",
    "Recipe",
    "RecipeError",
    "ResumeError",
    "StepResult",
    "joined",
    "launch",
    "load_recipe",
    "plan",
    "plan_model",
    "prepare",
    "profile",
    "train",
]

_HOMES = {
    "Engine": "engine",
    "Plan": "planner.plan",
    "Recipe": "config.schema",
    "StepResult": "step_result",
    "joined": "world",
    "launch": "launcher",
    "load_recipe": "config.load",
    "plan": "planner.plan",
    "plan_model": "planning_model",
    "prepare": "preparation",
    "profile": "profiling",
    "train": "training.loop",
}


def __getattr__(name: str) -> Any:
    """Import a public name on first use: planning must not need torch, and `--help` must be quick."""
    if name in _HOMES:
        return getattr(importlib.import_module(f"bigtrain.{_HOMES[name]}"), name)
    if name in ("amp", "data", "models", "optim", "recompute", "sharding"):
        return importlib.import_module(f"bigtrain.{name}")
    raise AttributeError(f"module {__name__!r} has no attribute {name!r}")


def __dir__() -> list[str]:
    return sorted([*__all__, "__version__"])
