"""The classes of a prediction sum to it, whatever is chosen, and hold what belongs in them."""

from __future__ import annotations

from typing import Any

import pytest

import bigtrain
from bigtrain.config.schema import Recipe
from bigtrain.planner import hardware
from bigtrain.planner.by_class import (
    ATTENTION,
    CALLS,
    COMMUNICATION,
    COPIES,
    ELEMENTWISE,
    FUSED,
    IDLE,
    LOSS,
    MATRIX,
    NORMALIZATION,
    OPTIMIZER,
    NamedWork,
    SpeedByClass,
    named,
)  # fmt: skip
from bigtrain.planner.plan import Plan
from bigtrain.planner.roofline import NOTHING, Work

WAYS: dict[str, dict[str, dict[str, Any]]] = {
    "plain": {},
    "accumulated": {"train": {"micro_batch_size": 2}},
    "compiled": {"train": {"compile": True}},
    "selective": {"recompute": {"policy": "selective"}},
    "full": {"recompute": {"policy": "full"}, "amp": {"precision": "bf16"}},
    "released": {"optimizer": {"gradient_release": True}, "train": {"max_grad_norm": None}},
    "sharded": {"cluster": {"devices_per_node": 2}, "sharding": {"zero_stage": 3}},
}


def plan_of(family: str, device: str, sections: dict[str, dict[str, Any]]) -> Plan:
    chosen: dict[str, dict[str, Any]] = {
        "model": {"family": family, "hidden_size": 256, "num_hidden_layers": 2, "num_attention_heads": 4},
        "data": {"vocab_size": 1000, "sequence_length": 64},
        "train": {"objective": "mlm" if family == "bert" else "clm", "global_batch_size": 8, "micro_batch_size": 4,
                  "steps": 10, "compile": False, "device": "cpu" if device == "cpu" else "cuda"},
        "optimizer": {"learning_rate": 1e-3, "state": "fp32", "gradient_release": False},
        "recompute": {"policy": "none"},
    }  # fmt: skip
    chosen["train"]["micro_batch_size"] = 8
    merged = {name: {**chosen.get(name, {}), **sections.get(name, {})} for name in {**chosen, **sections}}
    if sections.get("cluster"):
        merged["train"]["micro_batch_size"] = 4
    return bigtrain.plan(Recipe.model_validate({"name": "timed", **merged}), hardware.of_name(device))


def by_class(plan: Plan) -> dict[str, float]:
    return SpeedByClass(plan.recipe, plan.model, plan.hardware, plan.world_size).by_class(plan.choice)


@pytest.mark.parametrize("device", ["cpu", "h200"])
@pytest.mark.parametrize("family", ["bert", "gpt", "llama"])
@pytest.mark.parametrize("way", WAYS)
def test_classes_sum_to_the_step(way: str, family: str, device: str) -> None:
    plan = plan_of(family, device, WAYS[way])
    found = by_class(plan)
    assert sum(found.values()) == pytest.approx(plan.seconds.total, rel=1e-9)
    assert {MATRIX, ATTENTION, LOSS, OPTIMIZER, COPIES} <= set(found)
    assert (FUSED in found) == (way == "compiled")
    assert (COMMUNICATION in found) == (way == "sharded")
    assert (CALLS in found) == (device == "cpu")
    assert (IDLE in found) <= (device != "cpu")
    assert min(found.values()) > 0


def test_recomputing_adds_where_it_computes() -> None:
    none, full = (by_class(plan_of("gpt", "cpu", {"recompute": {"policy": name}})) for name in ("none", "full"))
    assert full[MATRIX] > 1.1 * none[MATRIX]
    assert full[NORMALIZATION] == pytest.approx(none[NORMALIZATION])  # plain products make norms again, too
    assert full[ELEMENTWISE] > none[ELEMENTWISE]
    assert full[LOSS] == none[LOSS]


def test_work_keeps_its_names() -> None:
    one = named(MATRIX, Work(2.0, 1.0))
    assert one == NamedWork(2.0, 1.0, {MATRIX: 2.0})
    both = NOTHING + one + Work(1.0, 3.0)
    assert both == NamedWork(3.0, 4.0, {MATRIX: 2.0, ELEMENTWISE: 1.0})
    assert both.called(2.0).calls == 8.0 and both.called(2.0).by_class == both.by_class
    assert (both * 2).by_class == {MATRIX: 4.0, ELEMENTWISE: 2.0}
    assert named(LOSS, both).by_class == {MATRIX: 2.0, LOSS: 1.0}
