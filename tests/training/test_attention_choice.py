"""The attention kernel of a run: measured at its start, the same one when it goes on."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from torch import Tensor

import bigtrain
from bigtrain.memory.predict import micro_batch
from bigtrain.models import attention_kernels
from bigtrain.models.attention import attend_varlen, in_use
from bigtrain.models.attention_kernels import OWN, Kernel
from bigtrain.planner.plan import Plan
from bigtrain.training import attention_choice
from bigtrain.training.attention_choice import case_of, choose_attention, suitable
from bigtrain.world import ALONE


def right(*given: Any) -> Tensor:
    return attention_kernels._reference(*given)


@pytest.fixture(autouse=True)
def as_on_a_gpu(monkeypatch: pytest.MonkeyPatch) -> Iterator[None]:
    monkeypatch.setattr(attention_choice, "is_chosen", lambda case, plan: True)
    yield
    in_use.call = attend_varlen


@pytest.fixture
def plan(tiny_recipes: dict[str, Path]) -> Plan:
    return bigtrain.plan(bigtrain.load_recipe(tiny_recipes["gpt"]))


def state(**notes: Any) -> Any:
    return SimpleNamespace(engine=SimpleNamespace(device=torch.device("cpu")), notes=notes)


def kernel(name: str) -> Kernel:
    return Kernel(name, lambda: right, compiles=name == OWN)


def clock_of(*seconds: float) -> Any:
    left = list(seconds)
    return lambda run: left.pop(0)


def test_a_run_begins_with_the_fastest_and_goes_on_with_it(plan: Plan) -> None:
    held = state()
    among = [kernel(OWN), kernel("fast")]
    (line,) = choose_attention(plan, held, ALONE, among, clock_of(2e-3, 1e-3))
    assert line == f"attention: fast, measured on this run's shapes: {OWN} 2.00 ms, fast 1.00 ms"
    assert held.notes == {"attention": {"kernel": "fast"}}
    (line,) = choose_attention(plan, held, ALONE, among, clock_of())
    assert line == "attention: fast, as this run began"


def test_a_kernel_that_is_gone_is_told(plan: Plan) -> None:
    held = state(attention={"kernel": "gone"})
    lines = choose_attention(plan, held, ALONE, [kernel(OWN)], clock_of(1e-3))
    assert lines[1] == "attention: the run began with gone, which is gone: losses may differ in their last digits"
    assert held.notes == {"attention": {"kernel": OWN}}


def failing(*given: Any) -> Tensor:
    raise RuntimeError("no kernel image")


def test_a_kernel_that_cannot_run_here_is_told_and_another_chosen(plan: Plan) -> None:
    held = state(attention={"kernel": "old"})
    among = [kernel(OWN), Kernel("old", lambda: failing), kernel("fast")]
    lines = choose_attention(plan, held, ALONE, among, clock_of(2e-3, 1e-3))
    assert lines[0].startswith("attention: fast, measured")
    assert "began with old, which is left out: RuntimeError: no kernel image: losses may differ" in lines[1]
    assert held.notes == {"attention": {"kernel": "fast"}}


class Ranks:
    """Stands for a world of two ranks; the other one says the same, or that a kernel fails there."""

    def __init__(self, *, first: bool, choice: str = "", failing: str = "") -> None:
        self.first, self.choice, self.failing = first, choice, failing
        self.met = 0

    def any(self, flag: bool) -> bool:
        self.met += 1
        return flag

    def broadcast(self, text: str) -> str:
        return text if self.first else self.choice

    def gather(self, text: str) -> list[str]:
        other, self.failing = self.failing, ""
        return [text, other]


def test_ranks_meet_after_each_kernel_and_beat(plan: Plan, monkeypatch: pytest.MonkeyPatch) -> None:
    beats: list[int] = []
    monkeypatch.setattr(attention_choice.heartbeat, "beat", lambda: beats.append(1))
    among = [kernel(OWN), kernel("fast"), kernel("gone")]
    for first in (True, False):
        world, held = Ranks(first=first, choice="fast"), state()
        choose_attention(plan, held, world, among, clock_of(3e-3, 1e-3, 2e-3))  # type: ignore[arg-type]
        assert world.met == 3
        assert held.notes == {"attention": {"kernel": "fast"}}
    assert len(beats) == 6


def test_all_ranks_take_torchs_own_where_one_cannot_run_the_fastest(plan: Plan) -> None:
    world, held = Ranks(first=True, failing="left out: RuntimeError"), state()
    lines = choose_attention(plan, held, world, [kernel(OWN), kernel("fast")], clock_of(2e-3, 1e-3))  # type: ignore[arg-type]
    assert held.notes == {"attention": {"kernel": OWN}}
    assert lines[1] == "attention: fast was the fastest, and is left out: RuntimeError, on one rank at least"


def test_compiled_blocks_and_kept_products_know_torchs_kernels_alone(plan: Plan) -> None:
    among = [kernel(OWN), kernel("package")]
    names = []
    for changed in ("none", "selective"):
        recipe = plan.recipe.model_copy(
            update={"recompute": plan.recipe.recompute.model_copy(update={"policy": changed})}
        )
        names.append([one.name for one in suitable(SimpleNamespace(recipe=recipe), among)])  # type: ignore[arg-type]
    assert names == [[OWN, "package"], [OWN]]


def test_the_case_is_the_plans(plan: Plan) -> None:
    case, length = case_of(plan, torch.device("cpu")), plan.recipe.data.sequence_length
    assert sum(case.lengths) == plan.micro_batch_size * length
    places = micro_batch(plan.recipe, plan.micro_batch_size).documents
    assert case.lengths[-1] == 0
    assert len(case.lengths) >= places
    assert case.heads == (plan.model.num_attention_heads, plan.model.num_key_value_heads)


def test_nothing_is_chosen_on_a_cpu(plan: Plan, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.undo()
    held = state()
    assert choose_attention(plan, held, ALONE) == []
    assert held.notes == {}
