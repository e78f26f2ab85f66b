"""Golden plans: what is predicted for each shipped recipe on a few devices stays, unless a commit shows the change."""

from __future__ import annotations

import runpy
from pathlib import Path
from typing import Any

import pytest

from bigtrain.config.shipped import shipped_recipes
from bigtrain.planner.devices import devices

SCRIPT: dict[str, Any] = runpy.run_path(str(Path(__file__).parents[2] / "scripts" / "golden_plans.py"))
GOLDEN: Path = SCRIPT["GOLDEN"]
CASES: dict[str, tuple[str, str]] = SCRIPT["cases"]()


@pytest.mark.parametrize("file", CASES)
def test_plan_is_as_committed(file: str) -> None:
    path = GOLDEN / file
    assert path.is_file(), f"{file} is missing: run python scripts/golden_plans.py"
    now = SCRIPT["golden_text"](*CASES[file])
    assert now == path.read_text(encoding="utf-8"), "run python scripts/golden_plans.py, and say in the commit why"


def test_no_file_is_left_over() -> None:
    assert {path.name for path in GOLDEN.iterdir()} == set(CASES)


def test_every_recipe_is_planned_for_every_device() -> None:
    assert len(CASES) == len(shipped_recipes()) * len(SCRIPT["DEVICES"])
    assert set(SCRIPT["DEVICES"]) <= set(devices())


def test_plans_hold_the_bytes_and_no_path_of_a_machine() -> None:
    texts = [path.read_text(encoding="utf-8") for path in sorted(GOLDEN.iterdir())]
    fitting = [text for text in texts if '"allocated_bytes_peak":' in text]
    assert len(fitting) > len(texts) // 2
    assert all("exit code" in text for text in texts if text not in fitting)
    assert str(GOLDEN.parents[2]) not in "".join(texts)
