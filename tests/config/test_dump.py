"""A recipe written and read back is the same recipe."""

from __future__ import annotations

from typing import Any

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from pydantic import ValidationError

from bigtrain.config.dump import to_yaml
from bigtrain.config.keys import choices, expects, schema_keys, sections, takes
from bigtrain.config.load import load_recipe, read_recipe
from bigtrain.config.schema import Recipe
from bigtrain.config.shipped import shipped_recipes

printable = st.text(st.characters(exclude_categories=("Cc", "Cs")), min_size=1, max_size=12)
units = (
    st.integers(1, 2**62).map("{}B".format)
    | st.integers(1, 10**8).map("{}ms".format)
    | st.integers(0, 100).map("{}%".format)
)


def values_of(key: str) -> st.SearchStrategy[Any]:
    named = choices(key)
    kinds = [st.sampled_from(named)] if named else []
    kinds += [st.booleans()] if takes(key, bool) else []
    kinds += [st.none()] if "null" in expects(key) else []
    kinds += [units] if "unit" in expects(key) or "share" in expects(key) else []
    kinds += [st.integers(2, 2**62)] if takes(key, int) else []
    kinds += [st.floats(1e-9, 0.99)] if takes(key, float) else []
    kinds += [printable] if expects(key).startswith("text") else []
    kinds += [st.lists(printable, min_size=1, max_size=3)] if key == "data.source" else []
    kinds += [st.lists(st.sampled_from(named[:4]), min_size=1, max_size=3)] if "list of '" in expects(key) else []
    kinds += [st.just([0.5, 1e-7])] if key == "optimizer.betas" else []
    kinds += [st.from_regex(r"[A-Za-z0-9][A-Za-z0-9._-]{0,8}", fullmatch=True)] if key == "name" else []
    return st.one_of(kinds)


@st.composite
def recipes(draw: st.DrawFn) -> Recipe:
    values: dict[str, Any] = {section: {} for section in sections()}
    for key, field in schema_keys().items():
        if field.is_required() or draw(st.integers(0, 2)) == 0:
            section, _, name = key.rpartition(".")
            (values[section] if section else values)[name] = draw(values_of(key))
    try:
        return Recipe.model_validate(values)
    except ValidationError as error:
        # A unit of the wrong kind or a list where there is none: leave these keys at their defaults.
        for detail in error.errors():
            section, name = str(detail["loc"][0]), str(detail["loc"][1]) if len(detail["loc"]) > 1 else ""
            values[section].pop(name, None)
        return Recipe.model_validate(values)


@settings(max_examples=80, deadline=None)
@given(recipes(), st.dictionaries(st.sampled_from(["", *sections()]), st.text(max_size=30), max_size=3))
def test_round_trip(recipe, comments):
    text = to_yaml(recipe, comments)
    again = read_recipe(text.encode(), "r.yaml")
    assert again == recipe
    assert to_yaml(again, comments) == text


@pytest.mark.parametrize("name", shipped_recipes())
def test_shipped_recipes_come_back(name, tmp_path):
    recipe = load_recipe(name)
    file = tmp_path / "plan.yaml"
    file.write_text(to_yaml(recipe), encoding="utf-8")
    assert load_recipe(file) == recipe


def test_every_key_is_written_in_the_order_of_the_schema():
    origins = read_recipe(to_yaml(load_recipe("quickstart_bert")).encode(), "r")._origins
    assert [key for key in origins if key and key not in sections()] == list(schema_keys())


def test_units_are_exact_and_comments_stand_above():
    recipe = load_recipe("quickstart_bert", ["memory.budget=16GiB", "optimizer.eps=1e-8"])
    text = to_yaml(recipe, {"": "predicted\n\nby bigtrain", "memory": "of one rank", "nonsense": "x"})
    assert text.startswith("# predicted\n#\n# by bigtrain\nname: quickstart_bert\nseed: 1234\n\nmodel:\n")
    assert "\n# of one rank\nmemory:\n  budget: 16GiB\n" in text
    assert "\n  eps: 1e-08\n" in text and "\n  timeout: 60s\n" in text and "\n  warmup_steps: 10%\n" in text


@pytest.mark.parametrize(
    "text",
    [
        "no",
        "true",
        "null",
        "1e5",
        "~",
        "a: b",
        "# x",
        " a",
        'a"b\\',
        "é",
        "\u2028",
        "\U0001f600",
        "\ufeff",
        "-",
        "[a]",
        "*a",
    ],
)
def test_texts_that_yaml_could_take_for_something_else(text):
    recipe = load_recipe("quickstart_bert").model_copy()
    recipe = recipe.model_copy(update={"data": recipe.data.model_copy(update={"split": text})})
    assert read_recipe(to_yaml(recipe).encode(), "r").data.split == text
