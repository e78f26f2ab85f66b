"""The evaluation of a finished run, on its own validation data or on other data."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import Any

from bigtrain.checkpoint.manifest import step_of
from bigtrain.checkpoint.state import PLAN, TOKENIZER
from bigtrain.checkpoint.store import find_checkpoint
from bigtrain.config.load import load_recipe
from bigtrain.data.ensure import ensure_prepared
from bigtrain.engine import place
from bigtrain.planner.plan import plan
from bigtrain.training.evaluate import evaluate_plan
from bigtrain.training.generate import load_trained
from bigtrain.training.runtime import runtime


def evaluate_run(path: Path, overrides: Sequence[str] = ()) -> dict[str, Any]:
    """Return the evaluation of a run or checkpoint as a metrics row.

    `overrides` change the recipe that made it, such as `data.source=other.txt`; other data are read with the run's own
    tokenizer. Raises InputError for a run, an override or data that cannot be used.
    """
    folder = find_checkpoint(path)
    tokenizer = [f"data.tokenizer={folder / TOKENIZER}"] if any(o.startswith("data.") for o in overrides) else []
    here_plan = plan(load_recipe(folder / PLAN, ["train.device=auto", "train.compile=false", *tokenizer, *overrides]))
    trained = load_trained(folder)
    with runtime(here_plan) as here:
        place(trained.model, here.device, seed=0)
        found = evaluate_plan(trained.model, here_plan, ensure_prepared(here_plan.recipe), here.device)
    return {"step": step_of(folder) if folder.name.startswith("step-") else None, **found.row()}
