"""The recipes that come along: found, valid, and runnable cut short."""

from __future__ import annotations

import re

import pytest

from bigtrain.config import shipped
from bigtrain.config.load import load_recipe
from bigtrain.config.shipped import headline, recipe_path, shipped_recipes
from bigtrain.errors import RecipeError

NAMES = [
    "bert_base",
    "bert_large",
    "bert_large_phase1",
    "bert_large_phase2",
    "gpt2_124m",
    "gpt2_xl",
    "gpt_70b",
    "gpt_7b",
    "quickstart_bert",
    "quickstart_gpt",
]
SHORT = [
    "data.source=embedded",
    "train.steps=3",
    "train.global_batch_size=8",
    "data.sequence_length=128",
    "train.device=cpu",
]


def test_all_are_there():
    assert list(shipped_recipes()) == NAMES


@pytest.mark.parametrize("name", NAMES)
def test_recipe_holds_as_it_is_and_cut_short(name):
    recipe = load_recipe(recipe_path(name))
    assert recipe.name == name
    assert recipe.data.tokenizer == "train"
    assert str(recipe.optimizer.warmup_steps).endswith("%")
    assert load_recipe(name, SHORT).train.steps == 3


@pytest.mark.parametrize("name", NAMES)
def test_header_says_what_it_needs_and_how_to_launch_it(name):
    first, *lines = recipe_path(name).read_text(encoding="utf-8").splitlines()
    header = "\n".join(line for line in lines if line.startswith("#"))
    assert first == "# yaml-language-server: $schema=SCHEMA.json"
    assert "# Needs: " in header
    assert f"# Launch: bigtrain launch recipes/{name}.yaml" in header
    assert name.startswith("quickstart") or re.search(r"et al\. \d{4}", header)


@pytest.mark.parametrize("name", NAMES)
def test_headline_is_a_whole_sentence(name):
    line = headline(recipe_path(name))
    assert line[0].isupper() and line.endswith(".")


def test_headline_of_a_recipe_without_a_header(tmp_path):
    file = tmp_path / "r.yaml"
    for text, line in (("", ""), ("name: r\n# later\n", ""), ("#\n#  Mine. \nname: r", "Mine.")):
        file.write_text(text)
        assert headline(file) == line


def test_the_second_phase_starts_from_the_first():
    assert load_recipe("bert_large_phase2").train.init_from == "runs/bert_large_phase1"


def test_quickstarts_need_nothing():
    assert {load_recipe(name).data.source for name in NAMES if name.startswith("quick")} == {"embedded"}


def test_unknown_name():
    with pytest.raises(RecipeError, match="no shipped recipe is named 'bert_larg'; did you mean 'bert_large'"):
        recipe_path("bert_larg")


def test_recipes_inside_the_package_come_first(tmp_path, monkeypatch):
    package = tmp_path / "site" / "bigtrain"
    (package / "recipes").mkdir(parents=True)
    (package / "recipes" / "one.yaml").touch()
    monkeypatch.setattr(shipped.bigtrain, "__path__", [str(package)])
    assert list(shipped_recipes()) == ["one"]
    (package / "recipes" / "one.yaml").unlink()
    (package / "recipes").rmdir()
    (tmp_path / "site" / "recipes").mkdir()
    assert shipped_recipes() == {}
