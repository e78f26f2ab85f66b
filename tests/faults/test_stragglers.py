"""A rank that makes the others wait is named within 50 steps, wherever it loses the time, and nobody without one."""

from __future__ import annotations

import time
from pathlib import Path
from typing import Any

import pytest
from matrix import counted
from rank_trains import train_all

from bigtrain.training.metrics import read_metrics

SLOW_SECONDS, WITHIN, CLEAN = 0.2, 50, 500
STAGES = ("0", "3")
PLACES = {"data": "0", "forward": "3", "backward": "0", "update": "3"}
"""Where the time is lost, and under which ZeRO stage: the others wait in another exchange each time."""

TIERS = {"ci": ("data", "forward"), "nightly": tuple(PLACES)}


def case(recipe: Path, folder: Path, stage: str, steps: int, faults: str = "") -> dict[str, Any]:
    """Return a run on three ranks that saves and evaluates in between, as the first rank alone does more of."""
    overrides = [f"train.steps={steps}", "train.eval_every=20", f"sharding.zero_stage={stage}"]
    overrides += ["train.global_batch_size=6", "train.micro_batch_size=2", "cluster.devices_per_node=3"]
    overrides += ["checkpoint.every_steps=20", "data.sequence_length=16"]
    return {"recipe": str(recipe), "overrides": overrides, "folder": str(folder), "faults": faults}


def named(folder: Path) -> list[dict[str, Any]]:
    return [row for row in read_metrics(folder) if "straggler" in row]


@pytest.mark.parametrize(
    "tier", [pytest.param("ci", marks=pytest.mark.slow), pytest.param("nightly", marks=pytest.mark.nightly)]
)
def test_a_slow_rank_is_named_and_nobody_else(tiny_recipes: dict[str, Path], tmp_path: Path, tier: str) -> None:
    recipe, cases = tiny_recipes["gpt"], []
    for stage in STAGES:
        cases.append(case(recipe, tmp_path / f"clean-{stage}", stage, CLEAN // len(STAGES)))
    for place in TIERS[tier]:
        fault = f"{place}:slow={SLOW_SECONDS}:rank=1"
        cases.append(case(recipe, tmp_path / place, PLACES[place], WITHIN, fault))
    begin = time.monotonic()
    with counted("P5", tier) as counts:
        told = train_all(cases, 3, tmp_path)
        assert all(found["ended"] is None for rank in told for found in rank), told
        for stage in STAGES:
            found = named(tmp_path / f"clean-{stage}")
            counts.add(not found, f"false alarm under stage {stage}: {found}")
        for place in TIERS[tier]:
            found = named(tmp_path / place)
            fine = [row["straggler"] for row in found] == [1] and found[0]["step"] <= WITHIN
            fine = fine and 0.5 * SLOW_SECONDS < found[0]["straggler_seconds"] < 2 * SLOW_SECONDS
            counts.add(fine, f"{place}: {found}")
            counts.longest("steps until it is named", max((row["step"] for row in found), default=0))
        counts.longest("clean steps", CLEAN)
        counts.longest("seconds of the group", round(time.monotonic() - begin, 1))
