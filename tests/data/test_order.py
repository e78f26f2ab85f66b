from __future__ import annotations

from itertools import pairwise

import numpy as np
import pytest

from bigtrain.data.corpus import Corpus
from bigtrain.data.order import WHOLE, RowOrder, shares_of, stream_rows
from bigtrain.data.packing import RowIndex

BOUNDS = (0, 50, 57, 200)
WEIGHTS = [1.0, 2.0, 5.0]
ORDER = RowOrder(BOUNDS, shares_of(WEIGHTS), seed=3)


def test_one_source_is_its_own_stream(bert_corpus: Corpus) -> None:
    index = RowIndex.open(bert_corpus, "train", 32, packing=True)
    order = RowOrder.of(bert_corpus, "train", index, seed=5)
    places = np.arange(2 * len(index) + 9)
    assert order.bounds == (0, len(index))
    for found, expected in zip(order.rows_at(places), stream_rows(places, len(index), 5), strict=True):
        assert (found == expected).all()


@pytest.mark.parametrize("window", [16, 256, 5000])
def test_every_stretch_has_the_shares(window: int) -> None:
    places = np.arange(20_000)
    sources = np.searchsorted(BOUNDS, ORDER.rows_at(places)[0], side="right") - 1
    for start in range(0, 20_000 - window, 997):
        held = np.bincount(sources[start : start + window], minlength=3)
        assert (abs(held - window * np.array(WEIGHTS) / 8) < 3).all()


def test_each_source_goes_through_all_its_rows_each_epoch() -> None:
    rows, epochs = ORDER.rows_at(np.arange(8000))
    for first, end in pairwise(BOUNDS):
        own = (rows >= first) & (rows < end)
        for epoch in range(int(epochs[own].max())):  # the last one is cut off
            assert sorted(rows[own & (epochs == epoch)].tolist()) == list(range(first, end))
        assert (np.diff(epochs[own]) >= 0).all()
    assert len({tuple(rows[(rows >= 50) & (rows < 57) & (epochs == epoch)].tolist()) for epoch in range(20)}) > 15


def test_any_place_is_reached_alone() -> None:
    places = np.arange(5000)
    rows, epochs = ORDER.rows_at(places)
    for chosen in ([4711], [0, 4999, 17], np.random.default_rng(0).integers(0, 5000, 100).tolist()):
        found = ORDER.rows_at(np.array(chosen))
        assert (found[0] == rows[chosen]).all() and (found[1] == epochs[chosen]).all()
    far = np.arange(2**38, 2**38 + 64)
    assert (np.bincount(np.searchsorted(BOUNDS, ORDER.rows_at(far)[0], side="right") - 1) >= 7).all()


def test_seeds_differ() -> None:
    other = RowOrder(BOUNDS, ORDER.shares, seed=4)
    assert (ORDER.rows_at(np.arange(500))[0] != other.rows_at(np.arange(500))[0]).mean() > 0.9


def test_shares() -> None:
    assert shares_of([3.0]) == (WHOLE,)
    assert shares_of([]) == ()
    assert shares_of([1.0, 1.0]) == (WHOLE // 2, WHOLE)
    assert shares_of([1e-12, 1.0, 1e-12]) == (1, WHOLE - 1, WHOLE)
    assert shares_of([0.2, 0.3]) == shares_of([0.2 * 2**40, 0.3 * 2**40])
