"""Train on a disk that holds one checkpoint and not two, then when it holds them: `full_disk.py RECIPE FOLDER`.

FOLDER is a file system of its own. Prints what came of each.
"""

from __future__ import annotations

import json
import shutil
import sys
from pathlib import Path

import bigtrain
from bigtrain.checkpoint.manifest import step_folders
from bigtrain.errors import BigtrainError
from bigtrain.memory.state import saved_bytes
from bigtrain.training.metrics import read_metrics


def train(plan: bigtrain.Plan, folder: Path) -> dict[str, object]:
    """Return how a run ends, which steps it has logged, and which it has saved."""
    try:
        bigtrain.train(plan, folder)
        ended: object = 0
    except BigtrainError as error:
        ended = [error.exit_code, str(error)]
    return {
        "ended": ended,
        "logged": [row["step"] for row in read_metrics(folder)],
        "saved": [found.name for found in step_folders(folder)],
    }


def main(recipe: Path, folder: Path) -> None:
    plan = bigtrain.plan(bigtrain.load_recipe(recipe, ["train.eval_every=null"]))
    free = shutil.disk_usage(folder).free
    filler = folder / "filler"
    filler.write_bytes(bytes(free - int(1.5 * saved_bytes(plan.recipe, plan.model)) - 100_000))
    print(json.dumps(train(plan, folder / "run")), flush=True)
    filler.unlink()
    print(json.dumps(train(plan, folder / "run")), flush=True)


if __name__ == "__main__":
    main(Path(sys.argv[1]), Path(sys.argv[2]))
