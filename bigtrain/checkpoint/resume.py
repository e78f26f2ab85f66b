"""Whether a run folder can be used: writable, and made with the recipe that is asked for. No torch."""

from __future__ import annotations

import tempfile
from collections.abc import Iterator, Sequence
from pathlib import Path

from bigtrain.config.keys import schema_keys, sections
from bigtrain.config.load import read_recipe
from bigtrain.config.schema import Recipe, Section
from bigtrain.errors import Fault, InputError, ResumeError, did_you_mean
from bigtrain.planner.hardware import Hardware
from bigtrain.planner.price import budget_bytes

FREE_KEYS = (
    "train.steps", "train.tokens", "train.epochs", "train.eval_every", "train.eval_rows", "train.micro_batch_size",
    "sharding", "recompute", "memory", "checkpoint", "logging", "cluster", "data.cache",
)  # fmt: skip
"""What may change when a run goes on: none of it changes what is learned from which data."""

PLAN_FILE = "plan.yaml"

CHOSEN_KEYS = (
    "train.micro_batch_size", "train.compile", "optimizer.state", "optimizer.gradient_release", "amp.master_weights",
    "recompute.policy", "sharding.engine", "sharding.zero_stage", "sharding.replicate", "sharding.offload",
    "memory.budget",
)  # fmt: skip
"""Where `auto` is the planner's choice. Another choice of some of them would round otherwise."""

BOUNDING_KEYS = ("train.global_batch_size", "data.sequence_length", "optimizer.name", "amp.precision")
"""What a choice was made for, besides."""


def as_chosen_before(recipe: Recipe, run_dir: Path, hardware: Hardware) -> Recipe:
    """Return a recipe with each `auto` as the run in this folder has it, so that going on is bit by bit the same.

    What the planner chooses may differ from day to day: it goes by rates that were measured here. The recipe stays open
    where there is no such run, or it was on another kind of device, on other ranks, on more memory than is here, or
    where what is written now is not what was chosen then.
    """
    if not (run_dir / PLAN_FILE).is_file():
        return recipe
    before = stored_recipe(run_dir)
    budget = before.memory.budget
    enough = isinstance(budget, int) and budget <= budget_bytes(hardware)
    if before.train.device != hardware.kind or not _same_ranks(recipe, before, hardware) or not enough:
        return recipe
    if any(_value(recipe, key) not in ("auto", _value(before, key)) for key in (*CHOSEN_KEYS, *BOUNDING_KEYS)):
        return recipe
    for key in CHOSEN_KEYS:
        section, _, name = key.partition(".")
        chosen = {name: _value(before, key)}
        recipe = recipe.model_copy(update={section: getattr(recipe, section).model_copy(update=chosen)})
    return recipe


def _value(recipe: Recipe, key: str) -> object:
    section, _, name = key.partition(".")
    return getattr(getattr(recipe, section), name)


def _same_ranks(recipe: Recipe, before: Recipe, hardware: Hardware) -> bool:
    """Tell whether the ranks that a recipe names are those of a run; `auto` devices are those that are here."""
    written = recipe.cluster.devices_per_node
    devices = hardware.devices if written == "auto" else written
    return recipe.cluster.nodes == before.cluster.nodes and devices == before.cluster.devices_per_node


def stored_recipe(folder: Path) -> Recipe:
    """Return the resolved recipe that a run or checkpoint was made with; what it names need not be there any more.

    Raises RecipeError if the file was damaged, ResumeError if it is not there.
    """
    path = folder / PLAN_FILE
    if not path.is_file():
        raise ResumeError(f"{path}: no such file; this is no folder of a run")
    return read_recipe(path.read_bytes(), str(path))


def check_resume(run_dir: Path, recipe: Recipe, allowed: Sequence[str] = ()) -> None:
    """Raise ResumeError, a line a key, if a run folder holds the run of another recipe.

    `recipe` is resolved, as in a plan. `allowed` are dotted keys or sections that may differ this time. Raises
    InputError if there is no such key, or if the folder cannot be written.
    """
    _check_allowed(allowed)
    _check_writable(run_dir)
    if not (run_dir / PLAN_FILE).is_file():
        return
    before = dict(_leaves(stored_recipe(run_dir)))
    faults = [
        Fault(recipe.origin(key), key, f"{now!r}, but {run_dir} was started with {before.get(key)!r}; {_instead(key)}")
        for key, now in _leaves(recipe)
        if before.get(key) != now and not _covered(key, (*FREE_KEYS, *allowed))
    ]
    if faults:
        raise ResumeError(*faults)


def _check_allowed(allowed: Sequence[str]) -> None:
    known = [*schema_keys(), *sections()]
    unknown = [key for key in allowed if key not in known]
    if unknown:
        raise InputError(f"command line: --allow: no key {unknown[0]!r}{did_you_mean(unknown[0], known)}")


def _check_writable(run_dir: Path) -> None:
    """Try to make a folder where the run's will be, and take it away again."""
    try:
        existing = next(folder for folder in (run_dir, *run_dir.absolute().parents) if folder.exists())
        if existing.is_dir():
            Path(tempfile.mkdtemp(prefix=".probe-", dir=existing)).rmdir()
    except OSError as error:
        raise InputError(f"command line: --run-dir: {run_dir}: {error.strerror}; name another folder") from error
    if not existing.is_dir():
        raise InputError(f"command line: --run-dir: {existing} is a file; name another folder")


def _instead(key: str) -> str:
    return f"use another --run-dir, or --allow {key}"


def _covered(key: str, keys: Sequence[str]) -> bool:
    return any(key == free or key.startswith(free + ".") for free in keys)


def _leaves(section: Section, prefix: str = "") -> Iterator[tuple[str, object]]:
    for name, value in section:
        if isinstance(value, Section):
            yield from _leaves(value, f"{prefix}{name}.")
        else:
            yield f"{prefix}{name}", value
