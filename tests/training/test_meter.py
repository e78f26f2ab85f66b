"""Rates are means over the steps since the last row; pauses do not count."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch

import bigtrain
from bigtrain.step_result import StepResult
from bigtrain.training import meter as meter_module
from bigtrain.training.meter import Meter, Skips


class Clock:
    """A clock that is set by hand."""

    def __init__(self) -> None:
        self.now = 100.0

    def perf_counter(self) -> float:
        return self.now


@pytest.fixture
def clock(monkeypatch: pytest.MonkeyPatch) -> Clock:
    clock = Clock()
    monkeypatch.setattr(meter_module, "time", clock)
    return clock


def result(skipped: bool = False) -> StepResult:
    loss, norm = torch.tensor(2.5, dtype=torch.float64), torch.tensor(0.5)
    return StepResult(loss, norm, torch.tensor(not skipped), 1e-3, torch.tensor(4.0))


def test_rates_and_totals(tiny_recipes: dict[str, Path], clock: Clock) -> None:
    plan = bigtrain.plan(bigtrain.load_recipe(tiny_recipes["bert"]))
    meter = Meter(plan, 1e9, tokens=1000)
    for _ in range(4):
        meter.count()
    clock.now += 2.0
    with meter.paused():
        clock.now += 50.0
    row = meter.row_of(meter.due(result(), 4, 1800, 2))
    assert row["tokens_per_second"] == pytest.approx(400)
    assert row["model_flops_per_second"] == pytest.approx(400 * plan.flops_per_token)
    assert row["mfu"] == row["hfu"] == pytest.approx(400 * plan.flops_per_token / 1e9)
    assert row["seconds"] == pytest.approx(2.0)
    assert row["loss"] == 2.5
    assert row["loss_scale"] == 4.0
    assert row["skipped"] == 2
    assert meter.seconds_left(10) == pytest.approx(5.0)


def test_skipped_steps_are_counted_in_a_row_and_over_the_run() -> None:
    skips = Skips(late=False)
    assert [skips.add(result(skipped)) for skipped in (False, True, True)] == [False, True, True]
    assert (skips.total, skips.in_a_row) == (2, 2)
    assert not skips.add(result())
    assert (skips.total, skips.in_a_row) == (2, 0)


@pytest.mark.parametrize("late", [False, True])
def test_skipped_steps_go_on_being_counted(late: bool) -> None:
    skips = Skips(late=late)
    for skipped in (True, False, True, True):
        skips.add(result(skipped))
    assert skips.state_dict() == skips.state_dict() == {"total": 3, "in_a_row": 2}
    again = Skips(late=late, **skips.state_dict())
    for counter in (skips, again):
        counter.add(result(skipped=True))
    assert again.state_dict() == skips.state_dict() == {"total": 4, "in_a_row": 3}


def test_on_a_gpu_a_step_is_asked_about_when_the_next_one_has_been_taken() -> None:
    skips = Skips(late=True)
    assert [skips.add(result(skipped)) for skipped in (True, True, False, False)] == [False, True, True, False]
    assert (skips.total, skips.in_a_row) == (2, 0)
