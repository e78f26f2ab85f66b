"""Whether all ranks were started with the same: versions, recipe, data."""

from __future__ import annotations

import json
import platform
from collections.abc import Sequence
from itertools import zip_longest

from bigtrain.data.corpus import Corpus
from bigtrain.errors import InputError
from bigtrain.planner.plan import Plan
from bigtrain.training.run_files import versions
from bigtrain.world import World


def check_alike(world: World, plan: Plan, corpus: Corpus) -> None:
    """Raise InputError, with what differs, where ranks have other versions, another recipe or other data."""
    facts = {**versions(), "recipe": plan.to_yaml(), "data": corpus.folder.name}
    refuse_differences("rank", world.gather(json.dumps([platform.node(), facts])))


def refuse_differences(kind: str, told: Sequence[str]) -> None:
    """Raise InputError with the first thing that differs in what ranks or nodes told: [host, {fact: text}] in JSON."""
    (first, expected), *others = map(json.loads, told)
    for number, (node, found) in enumerate(others, 1):
        if differing := [key for key in expected if expected[key] != found[key]]:
            key = differing[0]
            here, there = _difference(expected[key], found[key])
            text = f"{key} is {there} on {node} ({kind} {number}) and {here} on {first} ({kind} 0)"
            raise InputError(f"the {kind}s differ: {text}; start all of them with the same")


def _difference(expected: str, found: str) -> tuple[str, str]:
    """Return what differs of two texts: the first lines that do."""
    lines = zip_longest(expected.splitlines(), found.splitlines(), fillvalue="missing")
    here, there = next(pair for pair in lines if pair[0] != pair[1])
    return here.strip(), there.strip()
