"""Which documents of a source are tokenized: those that pass the recipe's filter, each text once if it asks so."""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from itertools import compress
from typing import Any, NamedTuple

from bigtrain.config.schema import DataSection
from bigtrain.data.seen import Digests, Seen, digests_of

FILTERED, DUPLICATE = "filtered", "duplicate"
NOTHING_LEFT_OUT = {FILTERED: 0, DUPLICATE: 0}


class Selected(NamedTuple):
    """The documents that are kept of some, and how many were left out for what reason."""

    texts: list[str]
    left_out: dict[str, int]
    digests: bytes = b""
    """Of the kept documents, one after another, where duplicates are left out."""


class Selection:
    """Select documents batch by batch, in their order; `seen` are those of the batches before."""

    def __init__(self, data: DataSection, seen: Seen | None = None) -> None:
        self._data = data
        self._seen = seen if seen is not None else Seen()

    def select(self, texts: Sequence[str]) -> Selected:
        """Return what is kept of these documents, and remember it."""
        kept = [text for text in texts if passes(self._data, text)]
        filtered = len(texts) - len(kept)
        if not self._data.deduplicate or not kept:
            return Selected(kept, {FILTERED: filtered, DUPLICATE: 0})
        digests = digests_of(kept)
        is_new = self._seen.add(digests)
        new: Digests = digests[is_new]
        once = list(compress(kept, is_new.tolist()))
        return Selected(once, {FILTERED: filtered, DUPLICATE: len(kept) - len(once)}, new.tobytes())


def passes(data: DataSection, text: str) -> bool:
    """Tell whether a document is one that the recipe wants."""
    if len(text) < data.min_characters or (data.max_characters is not None and len(text) > data.max_characters):
        return False
    return not data.min_letters or letters_share(text) >= data.min_letters


def letters_share(text: str) -> float:
    """Return the share of letters, of any script, among the characters that are no white space."""
    shown = "".join(text.split())
    return sum(map(str.isalpha, shown)) / max(1, len(shown))


def selection_facts(data: DataSection) -> dict[str, Any]:
    """Return what a recipe asks of documents, for the fingerprint of what comes of them; empty where it asks nothing.

    So the tokenized data of recipes that ask nothing keep the name that they had before there was a filter.
    """
    return {name: value for name, value in _asked(data) if value != DataSection.model_fields[name].default}


def filter_facts(data: DataSection) -> Mapping[str, Any]:
    """Return that part of `selection_facts` which also decides what a tokenizer is trained on."""
    names = ("min_characters", "max_characters", "min_letters")
    return {name: value for name, value in selection_facts(data).items() if name in names}


def _asked(data: DataSection) -> Iterator[tuple[str, Any]]:
    yield "min_characters", data.min_characters
    yield "max_characters", data.max_characters
    yield "min_letters", data.min_letters
    yield "deduplicate", data.deduplicate
    yield "max_tokens", data.max_tokens


def left_out_text(left_out: Mapping[str, int]) -> str:
    """Return how many documents were left out for what reason, in words."""
    return f"{left_out[FILTERED]:,} documents by the filter, {left_out[DUPLICATE]:,} as duplicates"


def is_left_out(told: Any) -> bool:
    """Tell whether this says how many documents were left out for what reason."""
    reasons = isinstance(told, dict) and told.keys() == NOTHING_LEFT_OUT.keys()
    return reasons and all(type(count) is int and count >= 0 for count in told.values())
