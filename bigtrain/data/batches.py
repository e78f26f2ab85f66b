"""The documents of a source by batches, as many as are encoded at once."""

from __future__ import annotations

from collections.abc import Iterator
from typing import NamedTuple

from bigtrain.data.reading import Mark, Reading
from bigtrain.data.selection import Selection

BATCH_CHARACTERS = 2**20
"""Encoded at once: enough documents for every core, and no more than a hundred MB of encodings."""
BATCH_DOCUMENTS = 8192


class Batch(NamedTuple):
    """What is kept of the documents that were read, as in `Selected`, and the place after them."""

    texts: list[str]
    left_out: dict[str, int]
    digests: bytes
    mark: Mark


def batches(reading: Reading, selection: Selection) -> Iterator[Batch]:
    """Yield all documents; which of them are read together depends on nothing but their texts."""
    texts: list[str] = []
    characters = 0
    for text in reading:
        texts.append(text)
        characters += len(text)
        if characters >= BATCH_CHARACTERS or len(texts) == BATCH_DOCUMENTS:
            yield Batch(*selection.select(texts), reading.mark)
            texts, characters = [], 0
    if texts:
        yield Batch(*selection.select(texts), reading.mark)
