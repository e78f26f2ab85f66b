"""Runs on the ranks of a group, one after another, as the shipped loop trains them: `rank_resume.py CASES`.

CASES is a file with a list of cases: a recipe, a run folder, a port, and where to save again what was restored, or
null. The first ranks of the group train it, as many as it names; each prints, for each run, the digest of each row that
it has read, by step, as a line of JSON.
"""

from __future__ import annotations

import hashlib
import json
import os
import sys
from pathlib import Path
from typing import Any

import torch

import bigtrain
from bigtrain.batch import Batch
from bigtrain.checkpoint.state import TrainState
from bigtrain.checkpoint.store import CheckpointStore
from bigtrain.config.schema import Recipe
from bigtrain.planner import hardware
from bigtrain.training.run import Run
from bigtrain.world import joined

SECONDS = 500

READ: dict[int, list[str]] = {}
"""The digests of the rows of each step of the run under way."""


def noting_rows(plain: Any) -> Any:
    """Return a `Run._take_step` that notes the rows of its step."""

    def take(run: Run, batch: Batch) -> Any:
        READ[run._state.step] = [digest(*row) for row in zip(batch["input_ids"], batch["labels"], strict=True)]
        return plain(run, batch)

    return take


def digest(ids: torch.Tensor, labels: torch.Tensor) -> str:
    return hashlib.sha256(ids.numpy().tobytes() + labels.numpy().tobytes()).hexdigest()[:12]


def saving_again(plain: Any, folder: str | None) -> Any:
    """Return a `TrainState.restore` that saves what it has restored into another folder."""

    def restore(state: TrainState, *args: Any, **options: Any) -> None:
        plain(state, *args, **options)
        if folder is not None:
            state.save(CheckpointStore(Path(folder), world=state.engine.world), {})

    return restore


def main(cases: str) -> None:
    torch.set_num_threads(1)
    rank = int(os.environ.get("RANK", "0"))
    setattr(Run, "_take_step", noting_rows(Run._take_step))  # noqa: B010 - mypy has no way to say this
    plain = TrainState.restore
    for case in json.loads(Path(cases).read_text()):
        READ.clear()
        plan = bigtrain.plan(Recipe.model_validate(case["recipe"]), hardware.cpu())
        if rank < plan.world_size:
            size = str(plan.world_size)
            os.environ.update(WORLD_SIZE=size, LOCAL_WORLD_SIZE=size, RANK=str(rank), LOCAL_RANK=str(rank))
            os.environ["MASTER_PORT"] = str(case["port"])
            setattr(TrainState, "restore", saving_again(plain, case["again"]))  # noqa: B010
            torch.manual_seed(len(cases))  # what earlier runs have drawn must not matter
            with joined(kind="cpu", timeout_seconds=SECONDS):
                bigtrain.train(plan, case["folder"])
        print(json.dumps(READ), flush=True)


if __name__ == "__main__":
    main(sys.argv[1])
