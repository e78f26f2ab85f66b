"""Which run a checkpoint belongs to, whatever was allowed to change meanwhile."""

from __future__ import annotations

from pathlib import Path

import pytest

import bigtrain
from bigtrain.checkpoint.lineage import LINEAGE, identity, recipe_hash, remember
from bigtrain.training.run_files import write_run_files


def planned(recipe: Path, *overrides: str) -> bigtrain.Plan:
    return bigtrain.plan(bigtrain.load_recipe(recipe, list(overrides)))


def test_the_hash_is_of_what_may_not_change(tiny_recipes: dict[str, Path]) -> None:
    plain = recipe_hash(planned(tiny_recipes["gpt"]).recipe)
    for change in ("train.steps=99", "checkpoint.keep=5", "logging.every_steps=3", "train.eval_every=null"):
        assert recipe_hash(planned(tiny_recipes["gpt"], change).recipe) == plain
    for change in ("seed=2", "train.dropout=0", "optimizer.learning_rate=1e-4", "data.vocab_size=299"):
        assert recipe_hash(planned(tiny_recipes["gpt"], change).recipe) != plain


def test_a_run_remembers_what_it_has_gone_by(tiny_recipes: dict[str, Path], tmp_path: Path) -> None:
    first, second = planned(tiny_recipes["gpt"]), planned(tiny_recipes["gpt"], "seed=2")
    one = identity(tmp_path, first.recipe, "data")
    assert one == (recipe_hash(first.recipe), "data", frozenset([recipe_hash(first.recipe)]))
    remember(tmp_path, one)
    other = identity(tmp_path, second.recipe, "data")
    assert other.recipes == {one.recipe, other.recipe}
    remember(tmp_path, other)
    assert identity(tmp_path, first.recipe, "data").recipes == other.recipes


@pytest.mark.parametrize("damage", [None, "{", "[1]", "{}", "[" * 100_000])
def test_without_a_list_the_plan_tells(tiny_recipes: dict[str, Path], tmp_path: Path, damage: str | None) -> None:
    first, second = planned(tiny_recipes["gpt"]), planned(tiny_recipes["gpt"], "seed=2")
    write_run_files(tmp_path, first)
    if damage is not None:
        (tmp_path / LINEAGE).write_text(damage)
    assert identity(tmp_path, second.recipe, "data").recipes == {recipe_hash(first.recipe), recipe_hash(second.recipe)}
