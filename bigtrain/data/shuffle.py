"""A shuffle of any number of rows that needs no memory: where row i goes is computed, not stored."""

from __future__ import annotations

import numpy as np
from numpy.typing import NDArray

from bigtrain.data.hashing import Integers, key_of, mix

ROUNDS = 6
"""Four rounds make a Feistel network a pseudorandom permutation (Luby and Rackoff 1988); six cost little more."""


def shuffled(index: int, count: int, key: int) -> int:
    """Return where a shuffle of range(count) puts `index`; for one key a bijection."""
    return int(shuffled_many(np.array([index], np.int64), count, key)[0])


def shuffled_many(indices: NDArray[np.int64], count: int, key: int) -> NDArray[np.int64]:
    """Return `shuffled` of each index.

    A Feistel network permutes the smallest range of 4^h numbers that holds `count`; a result outside is sent
    through again until it falls inside (cycle walking: Black and Rogaway 2002, "Ciphers with Arbitrary Finite
    Domains"), fewer than four times on average.
    """
    half = np.uint64(max(1, ((count - 1).bit_length() + 1) // 2))
    keys = [int(key_of(key, number)[0]) for number in range(ROUNDS)]
    values = _feistel(indices.astype(np.uint64), half, keys)
    outside = np.flatnonzero(values >= count)
    while outside.size:
        values[outside] = _feistel(values[outside], half, keys)
        outside = outside[values[outside] >= count]
    return values.astype(np.int64)


def _feistel(values: Integers, half: np.uint64, keys: list[int]) -> Integers:
    low = (np.uint64(1) << half) - np.uint64(1)
    left, right = values >> half, values & low
    for key in keys:
        left, right = right, left ^ (mix(right ^ np.uint64(key)) & low)
    return (left << half) | right
