"""Ranks and machines."""

from __future__ import annotations

import pytest

from bigtrain.config.load import load_recipe
from bigtrain.config.schema import Recipe
from bigtrain.errors import RecipeError
from bigtrain.planner.cluster import for_fewest_nodes, placed, regrouped


def recipe_of(*overrides: str) -> Recipe:
    return load_recipe("quickstart_bert", ["train.global_batch_size=4096", *overrides])


def layout(recipe: Recipe) -> tuple[object, object]:
    return recipe.cluster.nodes, recipe.cluster.devices_per_node


def test_one_device_by_itself() -> None:
    recipe, ranks = placed(recipe_of(), None)
    assert ranks == 1 and layout(recipe) == (1, 1)


def test_what_the_recipe_names() -> None:
    recipe, ranks = placed(recipe_of("cluster.nodes=4", "cluster.devices_per_node=8"), None)
    assert ranks == 32 and layout(recipe) == (4, 8)


def test_of_a_range_the_fewest() -> None:
    recipe, ranks = placed(
        recipe_of("train.global_batch_size=4608", "cluster.nodes=2:4", "cluster.devices_per_node=8"), None
    )
    assert ranks == 16 and layout(recipe) == ("2:4", 8)


@pytest.mark.parametrize(("ranks", "expected"), [(1, (1, 1)), (4, (1, 4)), (8, (1, 8)), (4096, (512, 8)), (12, (2, 6))])
def test_a_world_size_decides_the_machines(ranks: int, expected: tuple[int, int]) -> None:
    recipe = recipe_of(f"train.global_batch_size={ranks * 4}")
    resolved, found = placed(recipe, ranks)
    assert found == ranks and layout(resolved) == expected
    assert placed(resolved, None) == (resolved, ranks)  # a plan says the same without the flag
    assert placed(resolved, ranks) == (resolved, ranks)


def test_devices_that_do_not_divide() -> None:
    with pytest.raises(
        RecipeError, match="3 devices a machine do not divide a world size of 8; use a divisor, such as 8"
    ):
        placed(recipe_of("cluster.devices_per_node=3", "train.global_batch_size=24"), 8)


def test_a_batch_that_does_not_divide() -> None:
    with pytest.raises(RecipeError, match="4096 is not divisible by 3 ranks; nearest that are: 4095, 4098"):
        placed(recipe_of(), 3)
    with pytest.raises(RecipeError, match="not divisible by micro_batch_size 4 x 2048 ranks"):
        placed(recipe_of("train.micro_batch_size=4"), 2048)


def test_too_few_rows_say_what_to_write() -> None:
    with pytest.raises(RecipeError, match="; write train.global_batch_size=8192, or use at most 4096 ranks") as caught:
        placed(recipe_of(), 8192)
    assert len(caught.value.faults) == 1 and "nearest that are: 8192" in str(caught.value)
    with pytest.raises(RecipeError, match="; write train.global_batch_size=16384, or use at most 1024 ranks"):
        placed(recipe_of("train.micro_batch_size=4"), 4096)
    with pytest.raises(RecipeError) as other:
        placed(recipe_of(), 3)
    assert "write" not in str(other.value)


def elastic(*overrides: str) -> Recipe:
    return recipe_of("train.global_batch_size=4800", "cluster.nodes=2:5", "cluster.devices_per_node=4", *overrides)


@pytest.mark.parametrize("ranks", [8, 12, 16, 20])
def test_a_range_stays_where_it_allows_the_machines(ranks: int) -> None:
    recipe, found = placed(elastic(), ranks)
    assert found == ranks and layout(recipe) == ("2:5", 4)
    assert layout(placed(elastic(), 24)[0]) == (6, 4)


def test_each_number_of_machines_of_a_range_is_to_divide_the_batch() -> None:
    with pytest.raises(RecipeError, match="4096 is not divisible by 2, 3, 4 and 5 ranks; nearest that are: 4080, 4140"):
        placed(recipe_of("cluster.nodes=2:5", "train.device=cuda"), None)


@pytest.mark.parametrize(
    ("stage", "replicate", "expected"),
    [
        (0, 8, [8, 12, 16, 20]),  # each rank a whole model
        (3, 1, [1, 1, 1, 1]),  # all one model
        (3, 2, [2, 3, 4, 5]),  # each machine one
        (2, 4, [4, 6, 8, 10]),  # each pair one
        (1, 8, [8, 12, 16, 20]),
    ],
)
def test_more_machines_are_more_groups_of_the_same_size(stage: int, replicate: int, expected: list[int]) -> None:
    written = elastic(f"sharding.zero_stage={stage}", f"sharding.replicate={replicate}")
    found = [placed(written, ranks)[0] for ranks in (8, 12, 16, 20)]
    assert [recipe.sharding.replicate for recipe in found] == expected
    fewest = [for_fewest_nodes(recipe, ranks) for recipe, ranks in zip(found, (8, 12, 16, 20), strict=True)]
    assert {recipe.sharding.replicate for recipe in fewest} == {replicate}


def test_a_group_that_does_not_divide_becomes_all_ranks() -> None:
    recipe = recipe_of("sharding.zero_stage=3", "sharding.replicate=3")
    assert regrouped(recipe, 12, 6).sharding.replicate == 1
    assert regrouped(recipe, 12, 16).sharding.replicate == 4


def test_what_is_open_or_no_range_stays() -> None:
    recipe = recipe_of("sharding.zero_stage=3", "sharding.replicate=2", "cluster.nodes=2")
    assert for_fewest_nodes(recipe, 64) is recipe
    opened = recipe_of("sharding.zero_stage=auto")
    assert regrouped(opened, 2, 4) is opened
