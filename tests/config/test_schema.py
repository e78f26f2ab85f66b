"""The recipe's sections, and that each key is of use."""

from __future__ import annotations

import re
from pathlib import Path

import pytest
from pydantic import ValidationError

import bigtrain
from bigtrain.config.keys import schema_keys, sections
from bigtrain.config.schema import Recipe
from bigtrain.config.unbuilt import BUILT

PACKAGE = Path(next(iter(bigtrain.__path__)))
SMALLEST = {
    "name": "r",
    "model": {"family": "bert"},
    "train": {"objective": "mlm"},
    "optimizer": {"learning_rate": 1e-3},
}


def test_defaults_change_no_mathematics():
    recipe = Recipe.model_validate(SMALLEST)
    assert recipe.optimizer.state == "fp32" and recipe.optimizer.gradient_release is False
    assert recipe.train.micro_batch_size == recipe.recompute.policy == recipe.sharding.zero_stage == "auto"


def test_unknown_keys_are_refused_everywhere():
    for values in (
        {**SMALLEST, "x": 1},
        *({**SMALLEST, name: {**SMALLEST.get(name, {}), "x": 1}} for name in sections()),
    ):
        with pytest.raises(ValidationError, match="extra_forbidden"):
            Recipe.model_validate(values)


def test_recipes_are_immutable():
    recipe = Recipe.model_validate(SMALLEST)
    with pytest.raises(ValidationError, match="frozen"):
        recipe.train.steps = 3


def test_equality_ignores_where_it_was_written():
    recipe = Recipe.model_validate(SMALLEST)
    assert recipe == recipe.with_origins({"name": "a.yaml:1"})
    assert recipe != recipe.model_copy(update={"seed": 1})
    assert recipe != "r"


def test_origins():
    recipe = Recipe.model_validate(SMALLEST).with_origins(
        {"": "a.yaml", "train": "a.yaml:4", "train.steps": "command line"}
    )
    assert recipe.origin("train.steps") == "command line"
    assert recipe.origin("train.objective") == "a.yaml:4"
    assert recipe.origin("data.source") == "a.yaml"
    assert recipe.writes("train.steps") and not recipe.writes("train.objective")
    assert Recipe.model_validate(SMALLEST).origin("train.steps") == ""


def test_origins_survive_a_copy():
    recipe = Recipe.model_validate(SMALLEST).with_origins({"seed": "a.yaml:2"})
    assert recipe.model_copy(update={"seed": 9}).origin("seed") == "a.yaml:2"


def test_a_recipe_crosses_a_process_as_json():
    values = {
        **SMALLEST,
        "memory": {"budget": "16GiB"},
        "cluster": {"timeout": "90s"},
        "checkpoint": {"every_minutes": 2},
    }
    recipe = Recipe.model_validate(values)
    assert Recipe.model_validate_json(recipe.model_dump_json()) == recipe
    assert Recipe.model_validate(recipe.model_dump()) == recipe


@pytest.mark.parametrize("name", ["a", "bert_large", "Run-1.2", "0"])
def test_names_of_runs(name):
    assert Recipe.model_validate({**SMALLEST, "name": name}).name == name


@pytest.mark.parametrize("name", ["", ".", "..", "a/b", "../a", "-a", "a b", "a\n", "ä"])
def test_names_that_are_no_folder(name):
    with pytest.raises(ValidationError):
        Recipe.model_validate({**SMALLEST, "name": name})


def test_every_key_is_read_by_some_module():
    """A key that nothing reads looks right and does nothing; those that this version refuses wait for their reader."""
    files = [file for file in PACKAGE.rglob("*.py") if file.parent.name != "config" or file.name == "model.py"]
    code = "\n".join(file.read_text(encoding="utf-8") for file in files)
    unbuilt = {key.rpartition(".")[2] for key in BUILT}
    words = {key.rpartition(".")[2] for key in schema_keys()} - unbuilt
    assert not {word for word in words if not re.search(rf"""[.'"]{word}\b""", code)}
