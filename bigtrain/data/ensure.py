"""A prepared corpus for a process that must stay lean: tokenizing happens in a child."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from contextlib import suppress
from pathlib import Path

from bigtrain.config.dump import to_yaml
from bigtrain.config.keys import schema_keys, sections
from bigtrain.config.load import read_recipe
from bigtrain.config.schema import Recipe
from bigtrain.data.corpus import Corpus, corpus_folder, is_prepared, open_corpus
from bigtrain.errors import BigtrainError, DataError, Fault

PACKAGE_PARENT = Path(__file__).parents[2]
FAULTS_FD = "BIGTRAIN_FAULTS_FD"
"""The child writes its faults to this descriptor, since standard error is for the one who prints them."""
STANDARD_ERROR = 2


def ensure_prepared(recipe: Recipe, *, aside: bool = False) -> Corpus:
    """Open a recipe's corpus; where there is none yet, let a child process make it first.

    `datasets`, pyarrow and `tokenizers` are never loaded here. The child shows its progress on standard output, or
    `aside` on standard error, and ends when this process does. Raises DataError with the child's faults.
    """
    if not is_prepared(corpus_folder(recipe)):
        _prepare_in_child(recipe, STANDARD_ERROR if aside else None)
    return open_corpus(recipe)


def child_environment() -> dict[str, str]:
    """Return the environment in which `python -P` finds this very package, and nothing in the current folder."""
    found = os.pathsep.join(filter(None, [str(PACKAGE_PARENT), os.environ.get("PYTHONPATH")]))
    return {**os.environ, "PYTHONPATH": found}


def _told(recipe: Recipe) -> bytes:
    """Return a recipe as a line of JSON: its text, and where its keys were written."""
    origins = {key: recipe.origin(key) for key in ("", *sections(), *schema_keys()) if recipe.writes(key)}
    return json.dumps({"recipe": to_yaml(recipe), "origins": origins}).encode() + b"\n"


def recipe_told(line: bytes) -> Recipe:
    """Return the recipe that `ensure_prepared` has told its child."""
    told = json.loads(line)
    return read_recipe(told["recipe"].encode(), "recipe").with_origins(told["origins"])


def _prepare_in_child(recipe: Recipe, output: int | None) -> None:
    reading, writing = os.pipe()
    child = subprocess.Popen(
        [sys.executable, "-P", "-m", "bigtrain.data"],
        bufsize=0,
        stdin=subprocess.PIPE,
        stdout=output,
        pass_fds=[writing],
        env={**child_environment(), FAULTS_FD: str(writing)},
    )
    os.close(writing)
    with child, os.fdopen(reading, "rb") as pipe:
        assert child.stdin is not None
        with suppress(BrokenPipeError):  # a child that could not even start says so by its exit code
            child.stdin.write(_told(recipe))  # and left open: its end tells the child that this process is gone
        faults = pipe.read()
        code = child.wait()
    if faults:
        found = (Fault(*fault) for fault in json.loads(faults))
        raise DataError(*(one if one.where else one._replace(where=recipe.origin(one.key)) for one in found))
    if code:
        raise BigtrainError(f"preparing the data ended with exit code {code}")
