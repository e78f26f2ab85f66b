"""The search as a whole: what is found, a fixed point, a sweep over budgets."""

from __future__ import annotations

from itertools import pairwise

import pytest
from searched import budgets, found, opened

from bigtrain.config.load import load_recipe
from bigtrain.errors import RecipeError
from bigtrain.planner.hardware import of_name
from bigtrain.planner.ranking import ALIKE
from bigtrain.planner.search import search, sweep
from bigtrain.planner.settle import settled


def test_a_plan_is_a_fixed_point() -> None:
    for budget in budgets()[1:]:
        first = found(f"memory.budget={budget}B")
        recipe, model, hardware, ranks = opened(f"memory.budget={budget}B")
        again = search(first.choice.into(recipe), model, hardware, ranks)
        assert (again.choice, again.memory, again.seconds) == (first.choice, first.memory, first.seconds)
        assert again.searched == 1
        assert again.rejected == ()


def test_more_memory_is_never_slower() -> None:
    points = sweep(*opened(), budgets())
    rates = [point.tokens_per_second for point in points]
    assert all(rate is not None for rate in rates)
    assert all(later >= before * (1 - ALIKE) for before, later in pairwise(rates))
    assert [point.budget_bytes for point in points] == budgets()


def test_a_sweep_finds_what_a_search_finds() -> None:
    for point in sweep(*opened(), budgets()[1:]):
        alone = found(f"memory.budget={point.budget_bytes}B")
        assert point.choice == alone.choice


def test_a_sweep_says_where_nothing_fits() -> None:
    (point,) = sweep(*opened(), [2**20])
    assert (point.choice, point.tokens_per_second) == (None, None)


def test_what_is_written_is_kept() -> None:
    choice = found("train.micro_batch_size=2", "recompute.policy=full", "optimizer.state=8bit").choice
    assert (choice.micro_batch_size, choice.accumulation_steps) == (2, 8)
    assert set(choice.recompute) == {"full"}
    assert choice.optimizer_state == "8bit"


def test_ranks_share_what_one_cannot_hold() -> None:
    pins = ("train.micro_batch_size=2", "recompute.policy=full", "data.sequence_length=1024")
    shared = search(*settled(load_recipe("gpt_7b", [*pins, "train.global_batch_size=16"]), of_name("h100"), 8))
    assert shared.choice.zero_stage > 0
    assert shared.choice.replicate < 8
    assert any("zero_stage" in entry.different and "over the budget" in entry.reason for entry in shared.rejected)


def test_faults_come_before_prices() -> None:
    with pytest.raises(RecipeError) as caught:
        found("sharding.offload=nvme", "recompute.policy=offload")
    assert len(caught.value.faults) == 2
