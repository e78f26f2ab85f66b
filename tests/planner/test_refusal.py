"""What is said when nothing fits."""

from __future__ import annotations

from typing import Any

import pytest
from searched import budgets, opened

from bigtrain.config.schema import Recipe
from bigtrain.errors import DoesNotFit
from bigtrain.planner.hardware import Hardware
from bigtrain.planner.offers import changed
from bigtrain.planner.refusal import rounded_up
from bigtrain.planner.search import search
from bigtrain.units import parse_bytes

PINNED = ("train.micro_batch_size=16", "recompute.policy=none")


def refusal(*overrides: str, hardware: Hardware | None = None) -> tuple[DoesNotFit, Recipe, Any]:
    recipe, *rest = opened(*overrides, hardware=hardware)
    with pytest.raises(DoesNotFit) as caught:
        search(recipe, *rest)
    return caught.value, recipe, rest


def test_what_does_not_fit_says_by_how_much_and_what_would() -> None:
    needed = budgets(*PINNED)[0]
    error, recipe, rest = refusal(*PINNED, f"memory.budget={needed - 2**20}B")
    line = str(error)
    assert line.startswith("command line: memory.budget: ")
    assert "less than the least this recipe needs" in line
    assert "\n" not in line
    assert error.exit_code == 3
    assert 2**20 <= error.over_bytes < 2**20 + 2**24
    assert error.change == "recompute.policy=auto" or error.change.startswith("recompute.policy=")
    assert line.endswith(f"; {error.change} would fit")
    search(changed(recipe, "recompute.policy", error.change.partition("=")[2]), *rest)


def test_a_budget_below_the_state_names_one_that_would_do() -> None:
    error, recipe, rest = refusal("memory.budget=1MiB", "data.sequence_length=32")
    needed = error.change.removeprefix("memory.budget=")
    assert needed in str(error)
    assert " train.micro_batch_size=" in str(error)
    search(changed(recipe, "memory.budget", parse_bytes(needed)), *rest)


def test_the_cheapest_change_comes_first() -> None:
    pins = ("train.micro_batch_size=16", "train.global_batch_size=16", "recompute.policy=full")
    needed = budgets(*pins)[0]
    error, _, _ = refusal(*pins, f"memory.budget={needed - 2**20}B")
    assert error.change.startswith("train.micro_batch_size=")


def test_a_change_of_numbers_is_the_smallest_that_fits() -> None:
    pins = ("train.micro_batch_size=1", "recompute.policy=full", "data.sequence_length=32", "data.vocab_size=8192")
    needed = budgets(*pins)[0]
    error, recipe, rest = refusal(*pins, f"memory.budget={needed - 2**20}B")
    assert error.change == "optimizer.state=bf16"
    search(changed(recipe, "optimizer.state", "bf16"), *rest)


@pytest.mark.parametrize("size", [1, 1023, 2**20, 2**20 + 1, 3 * 2**30 + 17, 123_456_789_012])
def test_a_rounded_size_is_no_smaller(size: int) -> None:
    assert size <= parse_bytes(rounded_up(size)) <= size * 1.01 + 1024
