"""Which run a checkpoint belongs to: by the recipe, in what may not change when a run goes on. No torch.

A run that went on with `--allow` has gone by several recipes, and checkpoints of each are its own. `lineage.json` in
the run folder holds the hashes of all; a manifest holds that of the recipe its step was taken by.
"""

from __future__ import annotations

import hashlib
import json
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any, NamedTuple

from bigtrain.checkpoint.resume import FREE_KEYS, earlier_recipe
from bigtrain.config.schema import Recipe
from bigtrain.data.cache import written_aside

LINEAGE = "lineage.json"

MAX_BYTES = 2**20


class Identity(NamedTuple):
    """What a manifest says of its run: hash of the recipe, fingerprint of the data; and all hashes of the run."""

    recipe: str
    data: str
    recipes: frozenset[str]


def identity(run_dir: Path, recipe: Recipe, data: str) -> Identity:
    """Return the identity of a run that goes by a resolved recipe now, whatever it went by before.

    Of a folder that `check_resume` has let pass. Raises as that does.
    """
    now = recipe_hash(recipe)
    return Identity(now, data, frozenset([*_earlier(run_dir), now]))


def remember(run_dir: Path, found: Identity) -> None:
    """Write down what a run has gone by. Before its plan.yaml, which then has the new recipe alone."""
    if _listed(run_dir) != sorted(found.recipes):
        with written_aside(run_dir / LINEAGE) as file:
            file.write((json.dumps(sorted(found.recipes), indent=1) + "\n").encode())


def recipe_hash(recipe: Recipe) -> str:
    """Return the SHA-256 of what may not change when a run goes on."""
    fixed = {key: value for key, value in _leaves(recipe.model_dump(mode="json"), "") if not _is_free(key)}
    return hashlib.sha256(json.dumps(fixed, sort_keys=True).encode()).hexdigest()


def _earlier(run_dir: Path) -> list[str]:
    """Return what a run has gone by; without a list, what its plan.yaml says, or a checkpoint's."""
    listed = _listed(run_dir)
    if listed is not None:
        return listed
    before = earlier_recipe(run_dir)
    return [] if before is None else [recipe_hash(before.recipe)]


def _listed(run_dir: Path) -> list[str] | None:
    """Return what a run's file lists; None where there is none that can be used."""
    path = run_dir / LINEAGE
    try:
        found = json.loads(path.read_bytes()) if path.stat().st_size <= MAX_BYTES else None
    except (OSError, ValueError, RecursionError):
        return None
    return found if isinstance(found, list) and all(isinstance(one, str) for one in found) else None


def _leaves(section: Mapping[str, Any], prefix: str) -> Iterator[tuple[str, Any]]:
    for name, value in section.items():
        if isinstance(value, dict):
            yield from _leaves(value, f"{prefix}{name}.")
        else:
            yield f"{prefix}{name}", value


def _is_free(key: str) -> bool:
    return any(key == free or key.startswith(free + ".") for free in FREE_KEYS)
