"""Elements of pages: whole, and texts stay texts."""

from __future__ import annotations

import json
import math
import re
from xml.etree import ElementTree

import pytest
from hypothesis import given, strategies

from bigtrain.charts.elements import details, figure, fill, html_table, json_in_html, legend, table, words
from bigtrain.charts.palette import LIGHT

HOSTILE = "</script><b>&amp;\"'$name"

texts = strategies.text(strategies.characters(exclude_categories=["C"]), max_size=20)


def parsed(html: str) -> ElementTree.Element:
    return ElementTree.fromstring(f"<div>{html}</div>")


def test_json_cannot_leave_its_element() -> None:
    data = {"</script>": ["<!--", "&amp;", "\u2028", 0.1]}
    text = json_in_html(data)
    assert not set(text) & set("<>&\u2028")
    assert json.loads(text) == data


def test_numbers_that_are_not_json_are_refused() -> None:
    with pytest.raises(ValueError, match="JSON"):
        json_in_html({"loss": math.nan})


def test_a_page_gets_its_parts_the_style_and_the_script() -> None:
    page = fill("<style>$style</style><p>$text</p><script>${script}start()</script>", text="$5")
    assert f"--page: {LIGHT['page']};" in page
    assert "<p>$5</p>" in page
    assert page.index('"use strict"') < page.index("function follow(") < page.index("start()")


def test_a_part_that_is_not_given_is_noticed() -> None:
    with pytest.raises(KeyError, match="text"):
        fill("$text")


def test_style_and_script_need_nothing_from_outside() -> None:
    assert not re.findall(r"https?:|url\(|@import|\bfetch\(|XMLHttp|</", fill("$style $script"))


def test_a_figure_holds_its_exact_value() -> None:
    root = parsed(figure("Peak", 12345678, "11.77 MiB", "allocated"))
    data = next(root.iter("data"))
    assert (data.attrib["value"], data.text) == ("12345678", "11.77 MiB")
    assert [element.text for element in root.iter() if element.tag in ("h3", "small")] == ["Peak", "allocated"]


def test_a_legend_names_classes() -> None:
    root = parsed(legend([("cause-0", "weights"), ("main dot", HOSTILE)]))
    assert [mark.attrib["class"] for mark in root.iter("i")] == ["cause-0", "main dot"]
    assert "".join(root.itertext()) == f"weights{HOSTILE}"


@given(strategies.lists(strategies.lists(texts, min_size=2, max_size=4), max_size=4), strategies.lists(texts))
def test_tables_show_texts_as_they_are(rows: list[list[str]], header: list[str]) -> None:
    root = parsed(table(rows, header))
    assert [cell.text or "" for cell in root.iter() if cell.attrib.get("scope") == "col"] == header
    assert [[cell.text or "" for cell in row] for row in root.iterfind(".//tbody/tr")] == rows


def test_cells_may_be_html() -> None:
    root = parsed(html_table([("<i>a</i>", "<b>1</b>")], ["<name>", ""]))
    assert [cell.tag for row in root.iterfind(".//tbody/tr") for cell in row] == ["th", "td"]
    assert next(root.iter("b")).text == "1"
    assert [cell.text for cell in root.iterfind(".//thead/tr/th")] == ["<name>", None]


def test_tables_may_have_no_head() -> None:
    assert "thead" not in table([("a", "b")])


def test_details_open_on_a_text() -> None:
    assert details("Recipe", None) == ""
    root = parsed(details("Recipe", HOSTILE))
    assert next(root.iter("pre")).text == HOSTILE


def test_words() -> None:
    assert words("optimizer_state") == "optimizer state"
