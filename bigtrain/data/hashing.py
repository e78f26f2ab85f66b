"""Random numbers as a pure function of where they are used: a hash of integers, whole arrays at a time.

A generator with a state would have to be replayed to reach row 10 million; a hash is there at once, and gives the
same numbers whatever the order of calls, the rank or the batch.
"""

from __future__ import annotations

import numpy as np
from numpy.typing import NDArray

Integers = NDArray[np.uint64]

_GOLDEN = np.uint64(0x9E3779B97F4A7C15)
_FIRST = np.uint64(0xBF58476D1CE4E5B9)
_SECOND = np.uint64(0x94D049BB133111EB)


def mix(values: Integers) -> Integers:
    """Return 64 random bits for each integer.

    The output function of SplitMix64 (Steele, Lea, Flood 2014, "Fast Splittable Pseudorandom Number Generators",
    with Stafford's constants), a bijection of the 64-bit integers.
    """
    z = values + _GOLDEN  # a new array: the steps below work in place
    z ^= z >> np.uint64(30)
    z *= _FIRST
    z ^= z >> np.uint64(27)
    z *= _SECOND
    z ^= z >> np.uint64(31)
    return z


def key_of(*numbers: int | Integers) -> Integers:
    """Return one 64-bit key, or an array of keys, for a list of numbers; their order counts."""
    key = np.zeros(1, np.uint64)
    for number in numbers:
        key = mix(key ^ mix(np.atleast_1d(np.asarray(number, np.uint64))))
    return key


def random_bits(keys: Integers, count: int) -> Integers:
    """Return (len(keys), count) random 64-bit integers, row i a pure function of key i."""
    steps = np.arange(count, dtype=np.uint64) * _GOLDEN
    return mix(keys[:, None] + steps)
