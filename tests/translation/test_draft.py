"""Recipes in the making: their text loads, tells where each line came from, and refuses what no recipe can have."""

from __future__ import annotations

import pytest

from bigtrain.config.load import read_recipe
from bigtrain.errors import InputError, RecipeError
from bigtrain.translation.draft import Draft
from bigtrain.translation.source import Source
from bigtrain.translation.tables import Row

TABLE = (Row("known", "seed"), Row("gone", "", "not here"), Row("set.*", "", "a setting"))


@pytest.mark.parametrize(
    ("preset", "family", "objective"),
    [(None, "gpt", "clm"), ("bert-base", "bert", "mlm"), ("llama-7b", "llama", "clm")],
)
def test_a_started_draft_is_a_recipe(preset: str | None, family: str, objective: str) -> None:
    draft = Draft.started("Made of something.", preset)
    draft.check("f")
    recipe = read_recipe(draft.text().encode(), "f")
    assert (recipe.model.family, recipe.train.objective) == (family, objective)
    assert draft.text().startswith("# Made of something.\n")
    assert draft.is_placeholder("data.source") and draft.is_placeholder("model.preset") is (preset is None)


def test_an_unknown_preset_is_told() -> None:
    with pytest.raises(InputError, match="command line: --model: unknown preset 'bert-bas'; did you mean 'bert-base'"):
        Draft.started("title", "bert-bas")


def test_lines_stand_in_the_order_of_the_schema_with_their_origin() -> None:
    draft = Draft.started("title", "bert-base")
    draft.put("checkpoint.keep", 2, "kept")
    draft.put("name", "mine", "told\n\x00")
    lines = draft.text().splitlines()
    assert "  keep: 2  # kept" in lines and "name: mine  # 'told\\n\\x00'" in lines
    places = [lines.index(line) for line in ("name: mine  # 'told\\n\\x00'", "model:", "train:", "checkpoint:")]
    assert places == sorted(places)


def test_the_length_of_a_run_is_given_once() -> None:
    draft = Draft.started("title", None)
    draft.put("train.epochs", 2.0, "theirs")
    assert "train.steps" not in draft.lines
    draft.put("train.steps", 7, "theirs")
    assert "train.epochs" not in draft.lines


def test_notes_stand_below_the_recipe_as_comments() -> None:
    draft = Draft.started("title", None)
    assert draft.notes() == []
    draft.change("a", "is another\x1b[31m")
    source = Source.of("f", {"known": 1, "gone": True, "knwon": 2, "set": {"x": 1, "y": 2, "z": None}, "quiet_a": 1})
    source.get("known")
    draft.leave_out(source, TABLE, ("quiet_*",))
    assert draft.missing == ["knwon: unknown; did you mean 'known'?", "gone: not here", "set.x, set.y: a setting"]
    text = draft.text()
    assert "\x1b" not in text and "# No counterpart:\n# - knwon: unknown" in text
    assert [note.split(":")[0] for note in draft.notes()] == ["means something else here", *["no counterpart"] * 3]
    draft.check("f")


def test_what_no_recipe_can_have_is_told_with_the_key_of_theirs() -> None:
    draft = Draft.started("title", None)
    draft.put("optimizer.learning_rate", -1.0, "their_rate")
    draft.put("optimizer.betas", {"a": 1}, "their_betas")
    with pytest.raises(RecipeError) as raised:
        draft.check("args.json")
    told = str(raised.value).splitlines()
    assert any(line.startswith("args.json: their_rate: optimizer.learning_rate: -1.0") for line in told)
    assert any(line.startswith("args.json: their_betas: optimizer.betas: a mapping") for line in told)
