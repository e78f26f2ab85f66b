from __future__ import annotations

import pytest

from bigtrain.config.schema import DataSection
from bigtrain.data.seen import Seen, digests_of
from bigtrain.data.selection import (
    Selection,
    filter_facts,
    is_left_out,
    left_out_text,
    letters_share,
    passes,
    selection_facts,
)

TEXTS = ["one fox", "12 34 56", "a", "one fox", "two foxes and more"]


def test_all_passes_where_nothing_is_asked() -> None:
    selected = Selection(DataSection()).select(TEXTS)
    assert selected == (TEXTS, {"filtered": 0, "duplicate": 0}, b"")


@pytest.mark.parametrize(
    ("keys", "kept"),
    [
        ({"min_characters": 2}, [0, 1, 3, 4]),
        ({"min_characters": 7}, [0, 1, 3, 4]),
        ({"max_characters": 7}, [0, 2, 3]),
        ({"min_letters": 0.5}, [0, 2, 3, 4]),
        ({"min_characters": 8, "max_characters": 8}, [1]),
    ],
)
def test_filter(keys: dict[str, float], kept: list[int]) -> None:
    data = DataSection.model_validate(keys)
    assert [number for number, text in enumerate(TEXTS) if passes(data, text)] == kept
    assert Selection(data).select(TEXTS).left_out == {"filtered": 5 - len(kept), "duplicate": 0}


@pytest.mark.parametrize(
    ("text", "share"),
    [("ab 12", 0.5), ("été", 1.0), ("日本 語", 1.0), ("1 2", 0.0), ("", 0.0), (" \n", 0.0), ("a.", 0.5)],
)
def test_share_of_letters(text: str, share: float) -> None:
    assert letters_share(text) == share


def test_duplicates_in_a_batch_and_after_it() -> None:
    selection = Selection(DataSection(deduplicate=True, min_characters=2))
    first = selection.select(TEXTS)
    assert first.texts == ["one fox", "12 34 56", "two foxes and more"]
    assert first.left_out == {"filtered": 1, "duplicate": 1}
    assert first.digests == digests_of(first.texts).tobytes()
    assert selection.select(["two foxes and more", "new one", "New one"]).texts == ["new one", "New one"]
    assert selection.select(["a"]) == ([], {"filtered": 1, "duplicate": 0}, b"")


def test_what_was_seen_before_counts() -> None:
    seen = Seen()
    seen.add(digests_of(["one fox"]))
    assert Selection(DataSection(deduplicate=True), seen).select(TEXTS[:2]).texts == ["12 34 56"]


def test_facts_hold_what_is_asked_alone() -> None:
    assert selection_facts(DataSection()) == filter_facts(DataSection()) == {}
    data = DataSection(min_letters=0.5, deduplicate=True, max_tokens=9)
    assert selection_facts(data) == {"min_letters": 0.5, "deduplicate": True, "max_tokens": 9}
    assert filter_facts(data) == {"min_letters": 0.5}


def test_counts_in_words_and_as_they_are_stored() -> None:
    assert left_out_text({"filtered": 1200, "duplicate": 3}) == "1,200 documents by the filter, 3 as duplicates"
    assert is_left_out({"filtered": 1, "duplicate": 0})
    for wrong in (None, {}, {"filtered": 1}, {"filtered": -1, "duplicate": 0}, {"filtered": True, "duplicate": 0}):
        assert not is_left_out(wrong)
