"""The same run on any number of ranks, at every stage: the losses and the norms of gradients are one process's.

Rows have from no label to many, so that a rank or a micro-batch weighed wrongly would show; the first rank has
micro-batches without any label. Always run: every stage on two ranks, hybrids and stage 3 on four; the rest nightly.
"""

from __future__ import annotations

from collections.abc import Callable
from functools import cache
from typing import Any

import pytest
from rank_run import LENGTH, ROWS, VOCABULARY, follow, on_ranks

from bigtrain.config.schema import Recipe

STEPS = 30
TOLERANCE = 1e-5
"""Relative; what the order of sums changes in fp32 is far below."""
COARSE = {"adafactor": 1e-4}
"""Of norms: its updates divide by means of few squares, so that a last bit grows."""
Case = tuple[int, str, str]
"""Ranks, family, or `pairs` for a BERT that learns of pairs of texts, and a layout or, at stage 3, a mechanism."""

FAMILIES = ("bert", "gpt")
LAYOUTS: dict[int, dict[str, dict[str, Any]]] = {
    2: {f"stage {stage}": {"zero_stage": stage} for stage in range(4)},
    4: {
        **{f"stage {stage}": {"zero_stage": stage} for stage in range(4)},
        **{f"hybrid {stage}": {"zero_stage": stage, "replicate": 2} for stage in (1, 2, 3)},
    },
}
CASES = [(world, family, name) for world, layouts in LAYOUTS.items() for family in FAMILIES for name in layouts]
CASES += [(2, "pairs", "stage 2"), (2, "pairs", "stage 3")]
ALWAYS_ON_FOUR = {
    ("gpt", "stage 3"),
    ("gpt", "hybrid 1"),
    ("bert", "hybrid 2"),
    ("bert", "hybrid 3"),
    ("gpt", "hybrid 3"),
}


def is_nightly(case: Case) -> bool:
    """Tell whether a case is left to nightly runs."""
    return case[0] == 4 and case[1:] not in ALWAYS_ON_FOUR


MARKED = [pytest.param(*case, marks=pytest.mark.nightly if is_nightly(case) else ()) for case in CASES]

MECHANISMS: dict[str, dict[str, dict[str, Any]]] = {
    "full recompute": {"recompute": {"policy": "full"}},
    "mixed recompute": {"recompute": {"policy": ["full", "none", "selective"]}},
    "lamb": {"optimizer": {"name": "lamb"}},
    "adafactor": {"optimizer": {"name": "adafactor"}},
    "muon": {"optimizer": {"name": "muon", "learning_rate": 1e-3}},
    "released": {"optimizer": {"gradient_release": True}, "train": {"max_grad_norm": None, "micro_batch_size": None}},
    "unclipped": {"train": {"max_grad_norm": None}},
}
"""What goes on around a step, at stage 3 on two ranks."""


def recipe_of(
    family: str,
    world: int = 1,
    sharding: dict[str, Any] | None = None,
    changed: dict[str, dict[str, Any]] | None = None,
) -> Recipe:
    """Return a small recipe in fp32, without dropout: which masks are drawn depends on the rank."""
    sections: dict[str, dict[str, Any]] = {
        "model": {
            "family": "bert" if family == "pairs" else family,
            "hidden_size": 36,  # 90 rows and 36 divide by 4 ranks with a rest, or leave parts of another size
            "num_hidden_layers": 3,
            "num_attention_heads": 4,
            "intermediate_size": 70,
        },
        "data": {"vocab_size": VOCABULARY, "sequence_length": LENGTH},
        "train": {
            "objective": {"bert": "mlm", "pairs": "mlm_nsp"}.get(family, "clm"),
            "steps": STEPS,
            "global_batch_size": ROWS,
            "micro_batch_size": 2,
            "dropout": 0.0,
            "compile": False,
            "device": "cpu",
        },
        "optimizer": {"name": "adamw", "learning_rate": 3e-3, "warmup_steps": 3, "weight_decay": 0.1},
        "amp": {"precision": "fp32"},
        "recompute": {"policy": "none"},
        "memory": {"budget": "1GiB"},
        "sharding": sharding or {},
        "cluster": {"devices_per_node": world},
    }
    for section, keys in (changed or {}).items():
        sections[section] |= keys
    if sections["train"]["micro_batch_size"] is None:
        sections["train"]["micro_batch_size"] = ROWS // world
    return Recipe.model_validate({"name": "ranks", **sections})


@cache
def alone(family: str, mechanism: str = "") -> dict[str, Any]:
    """Return what one process finds."""
    return follow(recipe_of(family, changed=MECHANISMS.get(mechanism)), STEPS)


Found = Callable[[int, str, str], dict[str, Any]]


def recipe_of_case(case: Case) -> Recipe:
    """Return the recipe of a layout, or of a mechanism at stage 3."""
    world, family, name = case
    if name in MECHANISMS:
        return recipe_of(family, world, {"zero_stage": 3}, MECHANISMS[name])
    return recipe_of(family, world, LAYOUTS[world][name])


@pytest.fixture(scope="module")
def found(tmp_path_factory: pytest.TempPathFactory) -> Found:
    """Return what tells what the ranks find in a case: one group of processes goes through all that it is among."""

    @cache
    def group(world: int, nightly: bool) -> dict[Case, dict[str, Any]]:
        cases = [case for case in CASES if case[0] == world and is_nightly(case) == nightly]
        cases += [(world, "gpt", name) for name in MECHANISMS if world == 2]
        recipes = [recipe_of_case(case) for case in cases]
        told = on_ranks(recipes, world, tmp_path_factory.mktemp("ranks"), steps=STEPS)
        return dict(zip(cases, told, strict=True))

    return lambda *case: group(case[0], is_nightly(case))[case]


def worst(values: list[float], expected: list[float]) -> float:
    """Return the largest relative difference."""
    return max(abs(value - one) / one for value, one in zip(values, expected, strict=True))


@pytest.mark.slow
@pytest.mark.parametrize(("world", "family", "name"), MARKED)
def test_losses_and_norms_are_those_of_one_process(found: Found, world: int, family: str, name: str) -> None:
    here, reference = found(world, family, name), alone(family)
    assert worst(here["losses"], reference["losses"]) <= TOLERANCE
    assert worst(here["norms"], reference["norms"]) <= TOLERANCE
    assert not here["skipped"] and reference["losses"][-1] < 0.9 * reference["losses"][0]


@pytest.mark.slow
@pytest.mark.parametrize("world", [2, pytest.param(4, marks=pytest.mark.nightly)])
def test_ranks_hold_parts_from_stage_1_on(found: Found, world: int) -> None:
    name = next(iter(found(world, "gpt", "stage 1")["held"]))
    whole = alone("gpt")["held"][name][0]
    assert found(world, "gpt", "stage 0")["held"][name][0] == whole
    for stage in (1, 2, 3):
        assert found(world, "gpt", f"stage {stage}")["held"][name][0] == -(-whole // world)


@pytest.mark.slow
@pytest.mark.parametrize("mechanism", MECHANISMS)
def test_mechanisms_are_those_of_one_process(found: Found, mechanism: str) -> None:
    here, reference = found(2, "gpt", mechanism), alone("gpt", mechanism)
    assert worst(here["losses"], reference["losses"]) <= TOLERANCE
    assert worst(here["norms"], reference["norms"]) <= COARSE.get(mechanism, TOLERANCE)
