"""Planning a plan returns it: every shipped recipe on every device of the table."""

from __future__ import annotations

import dataclasses

import pytest

from bigtrain.config.load import load_recipe, read_recipe
from bigtrain.config.shipped import shipped_recipes
from bigtrain.planner.devices import devices
from bigtrain.planner.hardware import Hardware, of_name
from bigtrain.planner.plan import plan

ROOMY = 20
"""Bytes a parameter that one rank has no room for in the largest models: those are planned for many ranks."""

LARGEST = {"gpt_70b": ("h100", "mi300x")}
"""Recipes that take seconds to plan, and the devices that they are planned for here."""


def ranks_for(name: str, memory_bytes: int) -> int:
    parameters = {"gpt_70b": 7e10, "gpt_7b": 7e9, "gpt2_xl": 1.6e9, "bert_large": 3.4e8}.get(
        name.partition("_phase")[0], 1.2e8
    )
    return 1 if parameters * ROOMY < memory_bytes or name.startswith("quickstart") else 64


def changes_for(hardware: Hardware) -> list[str]:
    """Return what a device needs: cards without bf16 another precision, processors a machine for each rank."""
    if hardware.kind == "cpu":
        return ["cluster.devices_per_node=1"]
    old = hardware.capability is not None and hardware.capability < (8, 0)
    return ["amp.precision=fp16"] if old else []


@pytest.mark.parametrize("device", devices())
def test_planning_a_plan_returns_it(device: str) -> None:
    hardware = of_name(device)
    for name in shipped_recipes():
        if device not in LARGEST.get(name, (device,)):
            continue
        ranks = ranks_for(name, hardware.memory_bytes)
        first = plan(load_recipe(name, changes_for(hardware)), hardware, world_size=ranks)
        text = first.to_yaml()
        again = plan(read_recipe(text.encode(), "plan.yaml"), hardware)
        assert again.to_yaml() == text
        assert again == dataclasses.replace(first, rejected=again.rejected, searched=again.searched)
