"""Whether a run folder can be used: writable, and made with the recipe that is asked for. No torch."""

from __future__ import annotations

import hashlib
import tempfile
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import NamedTuple

from bigtrain.checkpoint import manifest
from bigtrain.config.keys import schema_keys, sections
from bigtrain.config.load import read_recipe, recipe_bytes
from bigtrain.config.schema import Recipe, Section
from bigtrain.errors import CheckpointError, Fault, InputError, RecipeError, ResumeError, did_you_mean
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
    earlier = earlier_recipe(run_dir)
    if earlier is None:
        return recipe
    before = earlier.recipe
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


class Earlier(NamedTuple):
    """The resolved recipe that a run was started with, and the file that says so."""

    recipe: Recipe
    path: Path


def stored_recipe(folder: Path) -> Recipe:
    """Return the resolved recipe that a run or checkpoint was made with; what it names need not be there any more.

    Raises RecipeError if the file was damaged, ResumeError if it is not there.
    """
    path = folder / PLAN_FILE
    if not path.is_file():
        raise ResumeError(f"{path}: no such file; this is no folder of a run")
    try:
        return read_recipe(recipe_bytes(path), str(path))
    except OSError as error:
        raise ResumeError(f"{path}: {error.strerror}; make it readable") from error


def earlier_recipe(run_dir: Path) -> Earlier | None:
    """Return the recipe of the run that a folder holds, if it holds any.

    That is its plan.yaml, or where that is damaged or gone the one of the newest checkpoint whose digest it fits.
    Raises ResumeError where there is no such checkpoint either.
    """
    path, folders = run_dir / PLAN_FILE, manifest.step_folders(run_dir)
    if not path.exists() and not folders:
        return None
    try:
        return Earlier(_whole(stored_recipe(run_dir), path), path)
    except (RecipeError, ResumeError) as error:
        for folder in folders:
            if _is_undamaged(folder / PLAN_FILE):
                return Earlier(stored_recipe(folder), folder / PLAN_FILE)
        instead = "and none of the checkpoints has an undamaged one; put it back" if folders else "delete it"
        raise ResumeError(f"{error.faults[0]}; this run cannot go on, {instead}, or name another --run-dir") from error


def _whole(recipe: Recipe, path: Path) -> Recipe:
    """Return a recipe as it is. Raises ResumeError if a part of it is lost: what a plan leaves out has a default."""
    missing = [section for section in sections() if not recipe.writes(section)]
    if missing:
        raise ResumeError(f"{path}: damaged: it has no section {missing[0]!r}")
    return recipe


def _is_undamaged(plan_file: Path) -> bool:
    """Tell whether the plan in a checkpoint is the one that was written there."""
    try:
        expected = manifest.read(plan_file.parent)["files"][PLAN_FILE]["sha256"]
        return plan_file.is_file() and hashlib.sha256(plan_file.read_bytes()).hexdigest() == expected
    except (CheckpointError, KeyError, OSError):
        return False


def check_resume(run_dir: Path, recipe: Recipe, allowed: Sequence[str] = ()) -> Path | None:
    """Raise ResumeError, a line a key, if a run folder holds the run of another recipe.

    `recipe` is resolved, as in a plan. `allowed` are dotted keys or sections that may differ this time. Returns the
    file that tells what the run was started with, if there is a run. Raises InputError if there is no such key, or if
    the folder cannot be written.
    """
    _check_allowed(allowed)
    _check_writable(run_dir)
    earlier = earlier_recipe(run_dir)
    if earlier is None:
        return None
    before = dict(_leaves(earlier.recipe))
    faults = [
        Fault(recipe.origin(key), key, f"{_differs(now, before.get(key))} in {earlier.path}; {_instead(key)}")
        for key, now in _leaves(recipe)
        if before.get(key) != now and not _covered(key, (*FREE_KEYS, *allowed))
    ]
    if faults:
        raise ResumeError(*faults)
    return earlier.path


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


def _differs(now: object, before: object) -> str:
    return f"{_shown(now)}, but {_shown(before)}"


def _shown(value: object) -> str:
    """Return a value as a recipe has it."""
    if value is None or isinstance(value, bool):
        return "null" if value is None else str(value).lower()
    return repr(value)


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
