"""Runs on the ranks of a group, one after another, each with faults of its own: `rank_trains.py CASES`.

CASES is a file with a list of cases: a recipe's file, overrides, a run folder, and perhaps faults as in
`bigtrain.fault_points` and a window in which spikes show.
Each rank prints, for each run, what ended it, as a line of JSON.
"""

from __future__ import annotations

import json
import sys
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from group import SECONDS, told_by_all


def train_all(cases: Sequence[dict[str, Any]], world_size: int, folder: Path, *, seconds: float = SECONDS) -> Any:
    """Return what each of so many new processes prints of each case."""
    file = folder / f"cases-{world_size}.json"
    file.write_text(json.dumps(cases))
    return told_by_all([__file__, file], world_size, seconds=seconds)


def main(cases: str) -> None:
    """Train each case of a file."""
    import torch

    import bigtrain
    from bigtrain import fault_points
    from bigtrain.config.load import load_recipe
    from bigtrain.errors import BigtrainError
    from bigtrain.planner import hardware
    from bigtrain.training import spike
    from bigtrain.world import joined

    torch.set_num_threads(1)
    window = spike.WINDOW
    with joined(kind="cpu", timeout_seconds=300):
        for case in json.loads(Path(cases).read_text()):
            recipe = load_recipe(case["recipe"], case["overrides"])
            spike.WINDOW = case.get("window", window)
            fault_points._ASKED = fault_points.parse(case.get("faults", ""))
            ended = None
            try:
                bigtrain.train(bigtrain.plan(recipe, hardware.cpu()), case["folder"])
            except BigtrainError as error:
                ended = str(error)
            print(json.dumps({"ended": ended}), flush=True)


if __name__ == "__main__":
    main(sys.argv[1])
