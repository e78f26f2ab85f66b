"""Whether a run folder may be gone on with: the recipe it was made with, held against the one asked for. No torch."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from pathlib import Path

from bigtrain.config.load import load_recipe
from bigtrain.config.schema import Recipe, Section
from bigtrain.errors import Fault, ResumeError

FREE_KEYS = (
    "train.steps", "train.tokens", "train.epochs", "train.eval_every", "train.eval_rows", "train.micro_batch_size",
    "sharding", "recompute", "memory", "checkpoint", "logging", "cluster", "data.cache",
)  # fmt: skip
"""What may change when a run goes on: none of it changes what is learned from which data."""

PLAN_FILE = "plan.yaml"


def check_resume(run_dir: Path, recipe: Recipe, allowed: Sequence[str] = ()) -> None:
    """Raise ResumeError, a line a key, if a run folder holds the run of another recipe.

    `recipe` is resolved, as in a plan. `allowed` are dotted keys or sections that may differ this time.
    """
    path = run_dir / PLAN_FILE
    if not path.is_file():
        return
    before = dict(_leaves(load_recipe(path)))
    faults = [
        Fault(recipe.origin(key), key, f"{now!r}, but {run_dir} was started with {before.get(key)!r}; {_instead(key)}")
        for key, now in _leaves(recipe)
        if before.get(key) != now and not _covered(key, (*FREE_KEYS, *allowed))
    ]
    if faults:
        raise ResumeError(*faults)


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
