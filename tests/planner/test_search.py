"""The search as a whole: what is found, a fixed point, a sweep over budgets."""

from __future__ import annotations

from itertools import pairwise
from typing import Any

import pytest

from bigtrain.config.load import load_recipe
from bigtrain.errors import RecipeError
from bigtrain.planner.hardware import Hardware, of_name
from bigtrain.planner.offers import Offers
from bigtrain.planner.ranking import ALIKE, closest
from bigtrain.planner.search import Found, search, sweep
from bigtrain.planner.settle import settled

DEEP = (
    "model.hidden_size=128", "model.num_hidden_layers=6", "model.num_attention_heads=4", "data.vocab_size=512",
    "data.sequence_length=128", "train.global_batch_size=16",
)  # fmt: skip


def laptop() -> Hardware:
    return of_name("cpu-laptop")


def opened(*overrides: str, hardware: Hardware | None = None, world_size: int | None = None) -> tuple[Any, ...]:
    """Return what the search takes."""
    return settled(load_recipe("quickstart_gpt", [*DEEP, *overrides]), hardware or laptop(), world_size)


def found(*overrides: str, **where: Any) -> Found:
    return search(*opened(*overrides, **where))


def device_bytes(result: Found) -> int:
    assert result.memory.device_bytes_peak is not None
    return result.memory.device_bytes_peak


def budgets(*overrides: str, hardware: Hardware | None = None) -> list[int]:
    """Return budgets from what the closest choice needs to what no recomputation needs."""
    offers = Offers(*opened(*overrides, hardware=hardware))
    least = offers.report(closest(offers)).device_bytes_peak
    most = device_bytes(found(*overrides, hardware=hardware))
    assert least is not None
    return [least + (most - least) * part // 4 for part in range(5)]


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
        found("sharding.offload=all", "recompute.policy=offload")
    assert len(caught.value.faults) == 2
