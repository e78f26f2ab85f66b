from __future__ import annotations

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from bigtrain.data.hashing import key_of, mix, random_bits


def test_mix_is_splitmix64() -> None:
    # The first outputs of the published generator with seed 0, whose state grows by the golden ratio each time.
    golden = 0x9E3779B97F4A7C15
    states = np.array([(number * golden) % 2**64 for number in range(3)], np.uint64)
    assert mix(states).tolist() == [0xE220A8397B1DCDAF, 0x6E789E6AA1B965F4, 0x06C45D188009454F]


def test_mix_leaves_its_input() -> None:
    values = np.arange(4, dtype=np.uint64)
    mix(values)
    assert values.tolist() == [0, 1, 2, 3]


def test_mix_is_a_bijection_on_what_is_tried() -> None:
    assert len(set(mix(np.arange(100_000, dtype=np.uint64)).tolist())) == 100_000


@settings(max_examples=50, deadline=None)
@given(st.lists(st.integers(0, 2**63 - 1), min_size=1, max_size=4))
def test_key_is_pure_and_array_wise(numbers: list[int]) -> None:
    last = np.array([numbers[-1], 7], np.uint64)
    assert key_of(*numbers)[0] == key_of(*numbers[:-1], last)[0]


def test_order_and_count_of_numbers_matter() -> None:
    keys = [int(key_of(*numbers)[0]) for numbers in [(1, 2), (2, 1), (1,), (1, 2, 0), (0, 1, 2), (0,), (0, 0)]]
    assert len(set(keys)) == len(keys)


@pytest.mark.parametrize("count", [1, 7, 512])
def test_rows_of_bits_depend_on_their_key_alone(count: int) -> None:
    keys = key_of(5, np.arange(6, dtype=np.uint64))
    together = random_bits(keys, count)
    assert together.shape == (6, count)
    for row in range(6):
        assert np.array_equal(random_bits(keys[row : row + 1], count)[0], together[row])
    assert np.array_equal(random_bits(keys, 600)[:, :count], together)


def test_bits_are_even() -> None:
    bits = random_bits(key_of(9, np.arange(200, dtype=np.uint64)), 512).reshape(-1)
    ones = [int(((bits >> np.uint64(place)) & np.uint64(1)).sum()) for place in range(64)]
    expected, deviation = len(bits) / 2, (len(bits) / 4) ** 0.5
    assert max(abs(count - expected) for count in ones) < 5 * deviation


def test_neighbouring_rows_are_unrelated() -> None:
    bits = random_bits(key_of(9, np.arange(2, dtype=np.uint64)), 20_000).astype(np.float64) / 2**64
    assert abs(np.corrcoef(bits[0], bits[1])[0, 1]) < 0.04
    assert abs(np.corrcoef(bits[0, 1:], bits[0, :-1])[0, 1]) < 0.04
