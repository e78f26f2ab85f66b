"""Real steps, timed: every operator has its class, nothing is counted twice, and the prediction is the plan's."""

from __future__ import annotations

from pathlib import Path

import pytest

import bigtrain
from bigtrain.errors import InputError
from bigtrain.planner import hardware
from bigtrain.planner.by_class import ATTENTION, CALLS, LOSS, MATRIX, OPTIMIZER, OTHER
from bigtrain.planner.plan import Plan
from bigtrain.profiling import step_time
from bigtrain.profiling.step_time import time_recipe

STEPS = 2
SMALL = ("data.sequence_length=32", "train.global_batch_size=4", "train.micro_batch_size=2")


def quickstart(family: str, corpus: Path, *overrides: str) -> Plan:
    """Return a plan of a quickstart's shapes on a few documents."""
    edits = (f"data.source={corpus}", "data.validation_fraction=0.1", "train.device=cpu", "train.compile=false")
    recipe = bigtrain.load_recipe(f"quickstart_{family}", [*edits, "train.eval_rows=8", *overrides])
    return bigtrain.plan(recipe, hardware.cpu())


@pytest.fixture(autouse=True)
def _known_rates(monkeypatch: pytest.MonkeyPatch) -> None:
    """Measure no rates: they take as long as the steps."""
    monkeypatch.setattr(step_time, "peak_flops", lambda *_: 1e11)
    monkeypatch.setattr(step_time, "WARM_UP", 1)


@pytest.mark.slow
@pytest.mark.parametrize(
    ("family", "overrides"),
    [
        ("bert", ("train.dropout=0.1",)),
        ("gpt", ("recompute.policy=full",)),
        ("gpt", (*SMALL, "model.family=llama", "amp.precision=bf16", "optimizer.state=8bit")),
    ],
)
def test_every_operator_has_a_class_and_they_sum_to_the_step(
    corpus_file: Path, family: str, overrides: tuple[str, ...]
) -> None:
    plan = quickstart(family, corpus_file, *overrides)
    found = time_recipe(plan, steps=STEPS)
    measured = found.measured
    assert measured.steps == len(found.step_seconds) == STEPS
    assert sum(measured.by_class.values()) == pytest.approx(measured.seconds, rel=0.05)
    assert sum(measured.phases.values()) == pytest.approx(measured.seconds, rel=0.05)
    assert measured.by_class.get(OTHER, 0.0) < 0.05 * measured.seconds, measured.others
    assert min(measured.by_class.values()) >= 0
    assert {MATRIX, ATTENTION, LOSS, OPTIMIZER, CALLS} <= set(measured.by_class)
    assert {"forward", "backward", "update"} <= set(measured.phases)
    assert found.predicted_seconds == pytest.approx(sum(found.predicted_phases.values()))
    assert bigtrain.load_recipe(_written(corpus_file.with_name(f"plan_{family}.yaml"), found.recipe)).name
    assert set(found.versions) == {"bigtrain", "torch"}


def _written(file: Path, text: str | None) -> Path:
    assert text is not None
    file.write_text(text)
    return file


def test_what_cannot_be_timed(tiny_recipes: dict[str, Path]) -> None:
    plan = bigtrain.plan(bigtrain.load_recipe(tiny_recipes["gpt"]), hardware.cpu())
    with pytest.raises(InputError, match="profile: 0 steps take no time; take at least 1"):
        time_recipe(plan, steps=0)


@pytest.mark.gpu
def test_on_cuda_the_classes_sum_to_the_step(corpus_file: Path) -> None:
    plan = bigtrain.plan(
        bigtrain.load_recipe("quickstart_bert", [f"data.source={corpus_file}", "data.validation_fraction=0.1"])
    )
    found = time_recipe(plan).measured
    assert sum(found.by_class.values()) == pytest.approx(found.seconds, rel=0.05)
    assert found.by_class.get(OTHER, 0.0) < 0.05 * found.seconds, found.others
    assert {MATRIX, ATTENTION, OPTIMIZER} <= set(found.by_class)
