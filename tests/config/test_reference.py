"""What editors and readers get from the schema, and that it is up to date."""

from __future__ import annotations

import json
import runpy
import sys
from pathlib import Path

import jsonschema
import pytest

from bigtrain.config.dump import to_yaml
from bigtrain.config.keys import schema_keys, sections
from bigtrain.config.load import load_recipe
from bigtrain.config.reference import json_schema, key_meanings, reference_files, reference_text, write_reference
from bigtrain.config.shipped import recipe_path, shipped_recipes
from bigtrain.config.yaml_reader import read_yaml

ROOT = Path(__file__).parent.parent.parent
SCRIPT = ROOT / "scripts" / "generate_reference.py"


def valid(value) -> bool:
    return jsonschema.Draft202012Validator(json_schema()).is_valid(value)


def recipe(**sections_of):
    smallest = {"model": {"family": "bert"}, "train": {"objective": "mlm"}, "optimizer": {"learning_rate": 1e-3}}
    return {**smallest, **sections_of}


@pytest.mark.parametrize("name", ["SCHEMA.json", "REFERENCE.md"])
def test_generated_files_are_fresh(name):
    stale = "stale; run python scripts/generate_reference.py"
    assert (ROOT / "recipes" / name).read_text(encoding="utf-8") == reference_files()[name], stale


def test_the_schema_is_one():
    jsonschema.Draft202012Validator.check_schema(json_schema())


@pytest.mark.parametrize("name", shipped_recipes())
def test_the_schema_accepts_recipes_as_written_and_as_dumped(name):
    assert valid(read_yaml(recipe_path(name).read_text(encoding="utf-8"), str).value)
    assert valid(read_yaml(to_yaml(load_recipe(name)), str).value)


@pytest.mark.parametrize(
    "value",
    [
        recipe(),
        recipe(name="a"),
        recipe(memory={"budget": "16GiB"}),
        recipe(cluster={"timeout": "5min", "nodes": "2:4"}),
        recipe(train={"objective": "mlm", "tokens": "32B", "micro_batch_size": "auto"}),
        recipe(sharding={"zero_stage": 3}),
        recipe(optimizer={"learning_rate": 1, "warmup_steps": "6%"}),
    ],
)
def test_accepted(value):
    assert valid(value)


@pytest.mark.parametrize(
    "value",
    [
        {},
        recipe(x=1),
        recipe(memory={"budget": 24}),
        recipe(cluster={"timeout": 60}),
        recipe(amp={"precison": "bf16"}),
        recipe(amp={"precision": "bf61"}),
        recipe(train={"objective": "mlm", "steps": 0}),
        recipe(optimizer={"learning_rate": "x"}),
        recipe(optimizer={"learning_rate": 1, "warmup_steps": -1}),
        recipe(sharding={"zero_stage": 4}),
    ],
)
def test_refused(value):
    assert not valid(value)


def test_defaults_hold_in_the_schema_itself():
    definitions = json_schema()["$defs"]
    for definition in definitions.values():
        for name, key in definition["properties"].items():
            if "default" in key:
                whole = {"$defs": definitions, **key}
                assert jsonschema.Draft202012Validator(whole).is_valid(key["default"]), name


def test_every_key_has_a_meaning():
    meanings = key_meanings()
    assert set(meanings) == set(schema_keys())
    assert meanings["data.split"] == "The split of a hub data set."
    assert all(text.endswith(".") and "\n" not in text for text in meanings.values())


def test_every_key_is_described_for_editors():
    schema = json_schema()
    for key in schema_keys():
        section, _, name = key.rpartition(".")
        place = schema["$defs"][sections()[section].__name__] if section else schema
        assert place["properties"][name]["description"]
    assert "name" not in schema["required"]


def test_the_reference_has_a_row_for_each_key():
    text = reference_text()
    assert text.count("\n| `") == len(schema_keys())
    assert "| `learning_rate` | a number of 0 or more | required | The peak learning rate. |" in text
    assert "| `budget` | `auto`, or bytes with a unit, such as 16GiB or 80GB | `auto` |" in text
    assert "| `objective` | `mlm`, `clm` or `mlm_nsp` | required |" in text
    assert "| `asynchronous` | true or false | `true` |" in text


def test_write_reference_tells_what_was_stale(tmp_path):
    assert [file.name for file in write_reference(tmp_path)] == ["SCHEMA.json", "REFERENCE.md"]
    assert write_reference(tmp_path) == []
    (tmp_path / "REFERENCE.md").write_text("old")
    assert [file.name for file in write_reference(tmp_path)] == ["REFERENCE.md"]
    assert json.loads((tmp_path / "SCHEMA.json").read_text())["title"] == "bigtrain recipe"


def test_the_script_checks(monkeypatch, capsys):
    monkeypatch.setattr(sys, "argv", [str(SCRIPT), "--check"])
    with pytest.raises(SystemExit) as exit_:
        runpy.run_path(str(SCRIPT), run_name="__main__")
    assert (exit_.value.code, capsys.readouterr().out) == (0, "")
