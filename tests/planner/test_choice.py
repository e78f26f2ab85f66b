"""A choice goes into a recipe and comes back."""

from __future__ import annotations

import dataclasses

import pytest

from bigtrain.config.load import load_recipe
from bigtrain.planner.choice import Choice

CHOICE = Choice(
    micro_batch_size=2,
    accumulation_steps=2,
    recompute=("full", "none"),
    zero_stage=2,
    replicate=2,
    offload="optimizer",
    optimizer_state="8bit",
    gradient_release=False,
    master_weights="split24",
)
PINNED = ("train.global_batch_size=16", "amp.precision=bf16")


def test_there_and_back() -> None:
    recipe = CHOICE.into(load_recipe("quickstart_bert", PINNED))
    assert Choice.of(recipe, 2, 4) == CHOICE
    assert recipe.sharding.zero_stage == 2 and recipe.train.micro_batch_size == 2
    assert recipe.recompute.policy == ["full", "none"]


def test_one_word_where_all_blocks_are_alike() -> None:
    alike = dataclasses.replace(CHOICE, recompute=("full", "full"))
    assert alike.recompute_policy == "full"
    recipe = alike.into(load_recipe("quickstart_bert", PINNED))
    assert recipe.recompute.policy == "full"
    assert Choice.of(recipe, 2, 4) == alike


def test_the_recipe_stays_as_it_was() -> None:
    recipe = load_recipe("quickstart_bert", PINNED)
    CHOICE.into(recipe)
    assert recipe.train.micro_batch_size == "auto" and recipe.sharding.zero_stage == "auto"


def test_an_open_recipe_is_no_choice() -> None:
    with pytest.raises(AssertionError):
        Choice.of(load_recipe("quickstart_bert"), 2, 1)


def test_the_object_names_what_the_interface_names() -> None:
    shown = CHOICE.as_object()
    assert set(shown) == {field.name for field in dataclasses.fields(Choice)}
    assert shown["recompute"] == ["full", "none"]


def test_origins_survive() -> None:
    recipe = load_recipe("quickstart_bert", PINNED)
    assert CHOICE.into(recipe).origin("train.global_batch_size") == recipe.origin("train.global_batch_size")
