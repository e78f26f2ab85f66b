"""A recipe file and `key=value` overrides, read strictly into a Recipe."""

from __future__ import annotations

import os
import re
from collections.abc import Mapping, Sequence
from contextlib import suppress
from functools import partial
from os import PathLike
from pathlib import Path
from typing import Any

from pydantic import ValidationError

from bigtrain.config.checks import recipe_faults
from bigtrain.config.faults import schema_faults
from bigtrain.config.initial_shape import PLAN_FILE, shaped_as
from bigtrain.config.keys import sections
from bigtrain.config.overrides import apply_overrides
from bigtrain.config.paths import local_path
from bigtrain.config.schema import Recipe
from bigtrain.config.shipped import shipped_recipes
from bigtrain.config.unbuilt import unbuilt_faults
from bigtrain.config.yaml_reader import Document, read_yaml
from bigtrain.errors import Fault, RecipeError, nearest_word

LARGEST_FILE = 2**18
"""Bytes; a recipe has a few thousand, so a larger file is another kind of file, and PyYAML takes seconds for a MiB."""


def load_recipe(path: str | PathLike[str], overrides: Sequence[str] = ()) -> Recipe:
    """Read a recipe file, or a shipped recipe by its bare name, with overrides such as `train.steps=20` put over it.

    Raises RecipeError with every fault that was found, each with file and line or `command line`: first what is
    written wrongly, then what does not fit together, then what this version does not have.
    """
    file = _existing(path)
    try:
        content = recipe_bytes(file)
    except OSError as error:
        raise RecipeError(Fault(_printable(file), "", f"cannot be read: {error.strerror}")) from error
    recipe = _with_initial_shape(read_recipe(content, os.fspath(file), overrides, name=_run_name(file.stem)))
    if faults := recipe_faults(recipe) or unbuilt_faults(recipe):
        raise RecipeError(*faults)
    return recipe


def read_recipe(content: bytes, where: str, overrides: Sequence[str] = (), *, name: str = "recipe") -> Recipe:
    """Read a recipe's text against the schema alone; `name` is what it is called if it does not say.

    Raises RecipeError as `load_recipe` does, for what is written wrongly.
    """
    written = _document(content, where)
    readable = not written.broken
    apply_overrides(written, overrides)
    recipe = _validated(written, name) if readable else None
    if recipe is None or written.faults:
        raise RecipeError(*written.faults)
    return recipe.with_origins(written.origins)


def _with_initial_shape(recipe: Recipe) -> Recipe:
    """Return a recipe with the shape of the weights that `train.init_from` names, where they are there to be read.

    Where they are not, the recipe stays as it is: a run that has a checkpoint no longer needs them, and the launcher
    refuses what it cannot use.
    """
    source = recipe.train.init_from
    if source is None:
        return recipe
    plan_file = local_path(source) / PLAN_FILE
    with suppress(RecipeError, OSError):
        there = read_recipe(recipe_bytes(plan_file), str(plan_file))
        return shaped_as(recipe, there.model, str(plan_file))
    return recipe


def _run_name(stem: str) -> str:
    """Return what a run is called after its recipe's file: of other letters than a name may have, dashes are left."""
    return re.sub(r"[^A-Za-z0-9._-]+", "-", stem).strip("-._") or "recipe"


def _validated(written: Document, name: str) -> Recipe | None:
    """Return the recipe, or None once its faults are noted; a key already at fault gets no second line."""
    values: Any = written.value
    # A section of comments alone reads as null.
    values = {key: {} if value is None and key in sections() else value for key, value in values.items()}
    values = {"name": name, **values}
    try:
        return Recipe.model_validate(values)
    except ValidationError as error:
        told = {fault.key for fault in written.faults}
        found = schema_faults(error, values, written.origins)
        written.faults += [fault for fault in found if fault.key not in told]
        return None


def _document(content: bytes, where: str) -> Document:
    try:
        text = content.decode("utf-8-sig")
    except UnicodeDecodeError as error:
        wrong = f"not UTF-8 at byte {error.start} (0x{content[error.start]:02x}); save the file as UTF-8"
        return Document({}, faults=[Fault(where, "", wrong)], broken=True)
    written = read_yaml(text, partial("{}:{}".format, where))
    written.origins[""] = where
    if not isinstance(written.value, dict):
        if not written.faults:
            empty = written.value is None
            wrong = "the file is empty" if empty else "a recipe is a mapping of sections such as 'model:'"
            written.faults.append(Fault(where, "", wrong))
        written.value, written.broken = {}, True
    return written


def _existing(path: str | PathLike[str]) -> Path:
    file = Path(path)
    try:
        folder, there = file.is_dir(), file.exists()
    except (OSError, ValueError) as error:  # a name too long, or with a zero byte in it
        reason = error.strerror if isinstance(error, OSError) else error
        raise RecipeError(Fault(_printable(file), "", f"cannot be read: {reason}")) from error
    if folder:
        raise RecipeError(Fault(_printable(file), "", "is a folder; name a recipe file in it"))
    if there:
        return file
    recipes = shipped_recipes()
    if str(path) in recipes:
        return recipes[str(path)]
    raise RecipeError(Fault(_printable(file), "", f"no such file{_meant(file, recipes)}"))


def _meant(file: Path, recipes: Mapping[str, Path]) -> str:
    siblings = {sibling.stem: str(sibling) for sibling in sorted(file.parent.glob("*.yaml"))}
    nearest = nearest_word(file.stem, [*siblings, *recipes])
    if nearest is None:
        return f"; the shipped recipes are {', '.join(recipes)}"
    return f"; did you mean {siblings.get(nearest, nearest)!r}?"


def recipe_bytes(file: Path) -> bytes:
    """Return what is in a recipe file. Raises RecipeError for one that is larger than a recipe, and OSError."""
    with file.open("rb") as stream:
        content = stream.read(LARGEST_FILE + 1)
    if len(content) > LARGEST_FILE:
        raise RecipeError(Fault(_printable(file), "", "larger than 256 KiB; this is not a recipe"))
    return content


def _printable(file: Path) -> str:
    text = os.fspath(file)
    return text if text.isprintable() else ascii(text)
