"""The tables: what they name exists, nothing stands there twice, and they read as tables."""

from __future__ import annotations

from pathlib import Path

import pytest

from bigtrain.config.keys import schema_keys
from bigtrain.translation.tables import DEEPSPEED, NANOGPT, QUIET, TRAINER, Row, asks_for_something, markdown, row_of

TABLES = {"deepspeed": DEEPSPEED, "trainer": TRAINER, "nanogpt": NANOGPT}
each_table = pytest.mark.parametrize("table", TABLES.values(), ids=list(TABLES))


@each_table
def test_every_key_of_a_recipe_is_one(table: tuple[Row, ...]) -> None:
    named = {key for row in table for key in row.ours.split() if not key.endswith(".*")}
    assert named
    assert named <= set(schema_keys())


@each_table
def test_no_key_of_theirs_stands_there_twice(table: tuple[Row, ...]) -> None:
    keys = [key for row in table for key in row.keys]
    assert len(keys) == len(set(keys))


@each_table
def test_what_has_no_counterpart_says_why(table: tuple[Row, ...]) -> None:
    assert not [row.theirs for row in table if not row.ours and not row.note]


def test_no_key_is_quiet_and_listed() -> None:
    assert not {word for word in QUIET if row_of(TRAINER, word) is not None}


@each_table
def test_a_table_of_the_documentation_has_a_line_a_row(table: tuple[Row, ...]) -> None:
    lines = list(markdown(table))
    assert len(lines) == len(table) + 2
    assert all(line.count("|") - line.count("\\|") == 4 for line in lines)


def test_a_key_is_found_itself_before_its_section_and_that_before_what_is_around() -> None:
    rows = (Row("a.b", "seed"), Row("a.b.*", "", "inner"), Row("a.*", "", "outer"))
    assert row_of(rows, "a.b") is rows[0]
    assert row_of(rows, "a.b.c.d") is rows[1]
    assert row_of(rows, "a.x") is rows[2]
    assert row_of(rows, "b") is None


@pytest.mark.parametrize(
    ("value", "asks"),
    [(None, False), (False, False), ("none", False), ({}, False), (1, False), (True, True), (2, True)],
)
def test_idle_values_ask_for_nothing(value: object, asks: bool) -> None:
    assert asks_for_something(Row("key", "", "why", (1,)), value) is asks


@pytest.mark.parametrize(
    ("page", "name"),
    [
        ("coming_from_deepspeed", "deepspeed"),
        ("coming_from_transformers", "trainer"),
        ("coming_from_nanogpt", "nanogpt"),
    ],
)
def test_the_documentation_has_these_tables(page: str, name: str) -> None:
    text = (Path(__file__).parents[2] / "docs" / f"{page}.md").read_text(encoding="utf-8")
    table = "\n".join(markdown(TABLES[name]))
    assert f"<!-- table: {name} -->\n\n{table}\n\n<!-- end of table -->" in text, (
        "run python scripts/generate_tables.py"
    )
