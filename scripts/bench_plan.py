"""Time `bigtrain plan` on the device table: each shipped recipe on 1 to 4096 ranks, and choices searched per second.

Writes benchmarks/planning.json. Each time is that of a fresh process, as a user waits for it, the median of several;
`import` is that of one that imports what planning needs and does nothing. A recipe whose global batch the ranks cannot
share gets the smallest multiple of them that is no smaller, and says so.
"""

from __future__ import annotations

import argparse
import json
import math
import os
import statistics
import subprocess
import sys
import time
from pathlib import Path
from typing import Any

from provenance import provenance

from bigtrain.config.load import load_recipe
from bigtrain.config.shipped import shipped_recipes
from bigtrain.errors import BigtrainError
from bigtrain.planner.hardware import of_name
from bigtrain.planner.plan import plan

RANKS = (1, 8, 64, 4096)
DEVICES = ("rtx4090", "h100")
IMPORTS = "import bigtrain.cli, bigtrain.config.load, bigtrain.planner.plan, bigtrain.planner.show"
RESULT = Path(__file__).parent.parent / "benchmarks" / "planning.json"


def main() -> int:
    """Write the times and return 0."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--times", type=int, default=5, help="processes for each number")
    parser.add_argument("--output", type=Path, default=RESULT)
    options = parser.parse_args()
    cases = []
    for device in DEVICES:
        for recipe in shipped_recipes():
            for ranks in RANKS:
                cases.append(measured(recipe, device, ranks, options.times))
                print(json.dumps(cases[-1]), flush=True)
    found = {
        "import": process_seconds([sys.executable, "-c", IMPORTS], options.times),
        "repetitions": options.times,
        "cases": cases,
        **provenance(),
    }
    options.output.write_text(json.dumps(found, indent=1) + "\n", encoding="utf-8")
    return 0


def measured(recipe: str, device: str, ranks: int, times: int) -> dict[str, Any]:
    """Return how long a plan takes, from a process's start to its end, and how many choices it compares a second.

    A recipe that does not fit is timed too: a refusal is an answer.
    """
    rows = load_recipe(recipe).train.global_batch_size
    shared = math.lcm(rows, ranks) if rows > ranks else ranks
    overrides = [] if shared == rows else [f"train.global_batch_size={shared}"]
    command = [sys.executable, "-m", "bigtrain", "plan", recipe, "--device", device, "--world-size", str(ranks)]
    seconds = process_seconds([*command, *overrides], times)
    case = {"recipe": recipe, "device": device, "world_size": ranks, "overrides": overrides, **seconds}
    hardware, loaded = of_name(device), load_recipe(recipe, overrides)
    search_seconds, searched = math.inf, 0
    for _ in range(times):
        began = time.perf_counter()
        try:
            searched = plan(loaded, hardware, world_size=ranks).searched
        except BigtrainError:
            return case | {"fits": False}
        search_seconds = min(search_seconds, time.perf_counter() - began)
    return case | {"fits": True, "searched": searched, "choices_per_second": round(searched / search_seconds)}


def process_seconds(command: list[str], times: int) -> dict[str, float]:
    """Return the medians of so many runs of a command, which may refuse a recipe: on the clock, and of the processor.

    On a machine that does other things the second is nearer to what the first would be on a quiet one.
    """
    wall, processor = [], []
    for _ in range(times):
        began, before = time.perf_counter(), os.times()
        result = subprocess.run(command, capture_output=True, text=True, check=False)
        after = os.times()
        wall.append(time.perf_counter() - began)
        processor.append(after.children_user + after.children_system - before.children_user - before.children_system)
        if result.returncode not in (0, 3):
            raise RuntimeError(f"{' '.join(command)}: exit code {result.returncode}: {result.stderr.strip()}")
    return {
        "wall_seconds": round(statistics.median(wall), 3),
        "processor_seconds": round(statistics.median(processor), 3),
    }


if __name__ == "__main__":
    sys.exit(main())
