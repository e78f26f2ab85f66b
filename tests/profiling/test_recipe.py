"""A recipe's plan profiled on its own data: the same numbers as its prediction, and as a profile of a whole run."""

from __future__ import annotations

import dataclasses
from pathlib import Path

import pytest
import torch
from torch import nn

import bigtrain
from bigtrain.errors import InputError
from bigtrain.memory.measure import measure
from bigtrain.planner import hardware
from bigtrain.planner.choice import Choice
from bigtrain.planner.plan import Plan
from bigtrain.planner.price import memory_of
from bigtrain.profiling import profile
from bigtrain.profiling.recipe import changes, predicted, profile_recipe

PINNED = (
    "train.device=cpu",
    "train.compile=false",
    "train.global_batch_size=4",
    "train.micro_batch_size=4",
    "train.eval_every=null",
    "train.max_grad_norm=null",
    "checkpoint.every_steps=null",
    "recompute.policy=none",
    "optimizer.state=fp32",
    "optimizer.gradient_release=false",
    "amp.precision=fp32",
    "amp.master_weights=fp32",
    "train.steps=3",
)


def plan_of(recipe: Path, *overrides: str) -> Plan:
    return bigtrain.plan(bigtrain.load_recipe(recipe, [*PINNED, *overrides]), hardware.cpu())


@pytest.mark.parametrize("family", ["bert", "gpt"])
def test_measured_beside_predicted(
    tiny_recipes: dict[str, Path], tmp_path: Path, monkeypatch: pytest.MonkeyPatch, family: str
) -> None:
    # What measures the device's rates before a run holds 12 MiB, more than models as tiny as these.
    monkeypatch.setattr("bigtrain.training.loop.peak_flops", lambda *_: 1e11)
    plan = plan_of(tiny_recipes[family])
    profile = profile_recipe(plan)
    whole = measure(lambda: bigtrain.train(plan, tmp_path / "run")).peak_bytes
    assert profile.measured.memory.allocated_bytes_peak == pytest.approx(whole, rel=0.005)
    assert -0.0005 < profile.relative_error < 0.06  # rows count as full, and these documents leave some of them empty
    assert profile.predicted.memory == memory_of(plan.recipe, plan.model, plan.hardware)
    assert bigtrain.load_recipe(_written(tmp_path, profile.recipe)).name == plan.recipe.name
    assert set(profile.versions) == {"bigtrain", "torch"}


def _written(folder: Path, text: str | None) -> Path:
    assert text is not None
    file = folder / "plan.yaml"
    file.write_text(text)
    return file


def test_two_steps_do_not_show_the_peak(tiny_recipes: dict[str, Path]) -> None:
    with pytest.raises(InputError, match="profile: 2 steps do not show the peak; take at least 3"):
        profile_recipe(plan_of(tiny_recipes["gpt"]), steps=2)


def test_the_predicted_step_is_the_prediction(tiny_recipes: dict[str, Path]) -> None:
    plan = plan_of(tiny_recipes["gpt"])
    found = predicted(plan)
    columns = found.recording.timeline(found.step)["causes"]
    assert isinstance(columns, dict)
    assert max(map(sum, zip(*columns.values(), strict=True))) == found.memory.allocated_bytes_peak
    assert found.step_seconds is not None
    assert found.step_seconds > 0


def test_changes_hold_less_and_say_what_they_cost(tiny_recipes: dict[str, Path]) -> None:
    plan = plan_of(tiny_recipes["gpt"])
    found = {change["change"]: change for change in changes(plan)}
    assert {"recompute.policy=full", "train.micro_batch_size=2"} <= set(found)
    assert all(change["bytes"] < 0 for change in found.values())
    full = found["recompute.policy=full"]
    assert full["tokens_per_second"] is not None
    assert full["tokens_per_second"] < 0


def test_a_change_is_what_the_other_plan_predicts(tiny_recipes: dict[str, Path]) -> None:
    plan = plan_of(tiny_recipes["gpt"])
    choice = Choice.of(plan.recipe, plan.model.num_hidden_layers, 1)
    other = dataclasses.replace(choice, recompute=("full",) * len(choice.recompute)).into(plan.recipe)
    peaks = [memory_of(recipe, plan.model, plan.hardware).allocated_bytes_peak for recipe in (other, plan.recipe)]
    found = next(change for change in changes(plan) if change["change"] == "recompute.policy=full")
    assert found["bytes"] == peaks[0] - peaks[1]


def test_what_cannot_be_is_not_proposed(tiny_recipes: dict[str, Path]) -> None:
    clipped = changes(plan_of(tiny_recipes["gpt"], "train.max_grad_norm=1.0"))
    assert "optimizer.gradient_release=true" not in {change["change"] for change in clipped}
    assert "amp.master_weights=split24" not in {change["change"] for change in clipped}
    assert "train.micro_batch_size=2" not in {
        c["change"] for c in changes(plan_of(tiny_recipes["gpt"], "train.micro_batch_size=1"))
    }


def test_one_function_for_plans_and_models(tiny_recipes: dict[str, Path], monkeypatch: pytest.MonkeyPatch) -> None:
    calls: list[tuple[str, object]] = []
    monkeypatch.setattr("bigtrain.profiling.recipe.profile_recipe", lambda *a, **k: calls.append(("recipe", k)))
    monkeypatch.setattr("bigtrain.profiling.model.profile_model", lambda *a, **k: calls.append(("model", a[1])))
    plan, model, sample = plan_of(tiny_recipes["gpt"]), nn.Linear(2, 2), {"input": torch.ones(1, 2)}
    profile(plan, steps=4)
    profile(model, sample)
    assert calls == [("recipe", {"steps": 4}), ("model", sample)]
    with pytest.raises(InputError, match="Linear needs a sample"):
        profile(model)
    with pytest.raises(InputError, match="leave out the sample"):
        profile(plan, sample)
