from __future__ import annotations

import numpy as np
from hypothesis import given, settings
from hypothesis import strategies as st

from bigtrain.data.shuffle import shuffled, shuffled_many


@given(st.integers(1, 3000), st.integers(0, 2**64 - 1))
@settings(max_examples=60, deadline=None)
def test_a_bijection(count: int, key: int) -> None:
    places = shuffled_many(np.arange(count), count, key)
    assert np.array_equal(np.sort(places), np.arange(count))


@given(st.integers(1, 2**62), st.integers(0, 2**64 - 1), st.data())
@settings(max_examples=60, deadline=None)
def test_stays_in_range_and_is_pure(count: int, key: int, data: st.DataObject) -> None:
    index = data.draw(st.integers(0, count - 1))
    place = shuffled(index, count, key)
    assert 0 <= place < count
    assert shuffled(index, count, key) == place


def test_one_by_one_is_the_same_as_together() -> None:
    together = shuffled_many(np.arange(1000), 1000, 17)
    assert [shuffled(index, 1000, 17) for index in range(1000)] == together.tolist()


def test_distinct_indices_of_a_huge_range_stay_distinct() -> None:
    assert len(set(shuffled_many(np.arange(10_000), 2**60 + 7, 3).tolist())) == 10_000


def test_keys_give_unrelated_orders() -> None:
    count = 5000
    one, other = (shuffled_many(np.arange(count), count, key) for key in (1, 2))
    assert (one == other).sum() < 10  # one is expected of unrelated orders
    assert abs(np.corrcoef(one, other)[0, 1]) < 0.07
    assert abs(np.corrcoef(one, np.arange(count))[0, 1]) < 0.07


def test_where_an_index_goes_is_even_over_keys() -> None:
    places = [shuffled(3, 8, key) for key in range(4000)]
    counts = np.bincount(places, minlength=8)
    assert counts.min() > 400
    assert counts.max() < 600


def test_input_is_left_alone() -> None:
    indices = np.arange(50)
    shuffled_many(indices, 50, 1)
    assert np.array_equal(indices, np.arange(50))
