"""The evaluation of a finished run or an imported folder, on the validation data of its recipe or on other data."""

from __future__ import annotations

import json
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from bigtrain import amp
from bigtrain.checkpoint.manifest import step_of
from bigtrain.checkpoint.state import PLAN, STATE, TOKENIZER
from bigtrain.checkpoint.store import find_checkpoint
from bigtrain.config.load import load_recipe
from bigtrain.data.corpus import Corpus
from bigtrain.data.ensure import ensure_prepared
from bigtrain.errors import Fault, InputError
from bigtrain.placement import place
from bigtrain.planner.plan import Plan, plan
from bigtrain.training.evaluate import evaluate_plan
from bigtrain.training.generate import load_trained
from bigtrain.training.runtime import device_of

CHANGEABLE = (
    "data.", "amp.", "train.eval_rows=", "train.micro_batch_size=", "train.masking_probability=",
    "train.whole_word_masking=", "train.device=",
)  # fmt: skip
"""What an evaluation may be told to do otherwise than the run did."""

ONE_PROCESS = (
    "cluster.nodes=1", "cluster.devices_per_node=1", "sharding.engine=auto", "sharding.zero_stage=auto",
    "sharding.replicate=auto", "sharding.offload=auto", "sharding.tensor_parallel=1",
)  # fmt: skip

PLAIN = (
    "train.device=auto",
    "train.compile=false",
    "train.init_from=null",
    "recompute.policy=none",
    "optimizer.gradient_release=false",
    "amp.master_weights=fp32",
    *ONE_PROCESS,
)
"""What an evaluation does otherwise than the run did in any case: weights are not updated, and need no mechanism."""


def evaluate_run(path: Path, overrides: Sequence[str] = ()) -> dict[str, Any]:
    """Return the evaluation of a run, a checkpoint or an imported folder as a metrics row.

    `overrides` change the recipe that made it, such as `data.source=other.txt`; other data are read with the run's own
    tokenizer. A folder that was imported without one needs `data.tokenizer`. Raises InputError for a run, an override
    or data that cannot be used.
    """
    folder = find_checkpoint(path)
    here_plan, corpus = _planned(folder, overrides)
    trained = load_trained(folder)
    device = device_of(here_plan)
    place(trained.model, device, seed=0)
    amp.apply(trained.model, here_plan.recipe.amp.precision)
    found = evaluate_plan(trained.model, here_plan, corpus, device)
    return {"step": step_of(folder) if folder.name.startswith("step-") else None, **found.row()}


def _planned(folder: Path, overrides: Sequence[str]) -> tuple[Plan, Corpus]:
    """Return the plan of the evaluation and its corpus, tokenized by the very tokenizer that the weights know."""
    changes, own_file = [*PLAIN, *overrides], folder / TOKENIZER
    own_tokenizer = f"data.tokenizer={json.dumps(str(own_file))}"
    is_run, has_tokenizer = (folder / STATE).is_file(), own_file.is_file()
    if not has_tokenizer and not any(override.startswith("data.tokenizer=") for override in overrides):
        text = f"missing: {folder} was imported without a tokenizer.json; name the one that the model was trained with"
        raise InputError(Fault("command line", "data.tokenizer", text))
    if has_tokenizer and (not is_run or any(override.startswith("data.") for override in overrides)):
        changes.append(own_tokenizer)
    planned = plan(load_recipe(folder / PLAN, changes), bounded=False)
    useless = [override for override in overrides if not override.startswith(CHANGEABLE)]
    if useless:
        key = useless[0].partition("=")[0]
        raise InputError(Fault("command line", key, "changes nothing in an evaluation; leave it out"))
    corpus = ensure_prepared(planned.recipe)
    if has_tokenizer and corpus.tokenizer_file.read_bytes() != own_file.read_bytes():
        planned = plan(load_recipe(folder / PLAN, [*changes, own_tokenizer]), bounded=False)
        corpus = ensure_prepared(planned.recipe)
    return planned, corpus
