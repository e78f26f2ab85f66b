"""Ranks that differ are told what differs, and where; those that do not go on."""

from __future__ import annotations

import json
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest

import bigtrain
from bigtrain.errors import InputError
from bigtrain.training.alike import check_alike, refuse_differences
from bigtrain.world import ALONE


class Others:
    """A world whose other ranks tell what they are made to."""

    def __init__(self, *changes: dict[str, str]) -> None:
        self.changes = changes

    def gather(self, text: str) -> list[str]:
        _node, facts = json.loads(text)
        return [text, *(json.dumps([f"node{n}", facts | change]) for n, change in enumerate(self.changes, 1))]


@pytest.fixture
def plan(tiny_recipes: dict[str, Path]) -> Any:
    return bigtrain.plan(bigtrain.load_recipe(tiny_recipes["gpt"]))


CORPUS: Any = SimpleNamespace(folder=Path("cache/corpus-1"))


def test_one_process_is_alike(plan: Any) -> None:
    check_alike(ALONE, plan, CORPUS)


def test_equal_ranks_go_on(plan: Any) -> None:
    world: Any = Others({}, {})
    check_alike(world, plan, CORPUS)


def test_another_version_is_named_with_both_hosts(plan: Any) -> None:
    world: Any = Others({}, {"torch": "2.11.0"})
    with pytest.raises(InputError, match=r"the ranks differ: torch is 2\.11\.0 on node2 \(rank 2\) and .*\(rank 0\)"):
        check_alike(world, plan, CORPUS)


def test_of_recipes_the_line_that_differs_is_shown(plan: Any) -> None:
    world: Any = Others({"recipe": plan.to_yaml().replace("seed: 1234", "seed: 7")})
    with pytest.raises(InputError, match="recipe is seed: 7 on node1.* and seed: 1234 on"):
        check_alike(world, plan, CORPUS)


def test_other_data_are_refused(plan: Any) -> None:
    world: Any = Others({"data": "corpus-2"})
    with pytest.raises(InputError, match="data is corpus-2 on node1.* and corpus-1 on"):
        check_alike(world, plan, CORPUS)


def test_a_text_that_goes_on_longer_differs_where_the_other_ends() -> None:
    told = [json.dumps(["a", {"recipe": "x: 1"}]), json.dumps(["b", {"recipe": "x: 1\ny: 2"}])]
    with pytest.raises(InputError, match=r"the nodes differ: recipe is y: 2 on b \(node 1\) and missing on a"):
        refuse_differences("node", told)
