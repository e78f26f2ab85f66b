"""Which texts were seen before, by 128-bit digests: 16 bytes a text, whatever its length."""

from __future__ import annotations

import hashlib
from collections.abc import Sequence
from typing import Any

import numpy as np
from numpy.typing import NDArray

DIGEST = "S16"
"""Of two different texts among 10**12 the chance of one digest is 10**-15."""

Digests = NDArray[np.bytes_]


def digests_of(texts: Sequence[str]) -> Digests:
    """Return the digest of each text, (len(texts),)."""
    hashes = (hashlib.blake2b(text.encode(), digest_size=np.dtype(DIGEST).itemsize).digest() for text in texts)
    return np.frombuffer(b"".join(hashes), DIGEST)


class Seen:
    """A set of digests that only grows: sorted runs, each more than twice as long as the next."""

    def __init__(self) -> None:
        self._runs: list[Digests] = []

    def __len__(self) -> int:
        return sum(map(len, self._runs))

    def add(self, digests: Digests) -> NDArray[np.bool_]:
        """Return which of these are new, of equal ones the first; from now on none of them is."""
        ordered, first = np.unique(digests, return_index=True)
        known = np.zeros(len(ordered), np.bool_)
        for run in self._runs:
            known |= _holds(run, ordered)
        is_new = np.zeros(len(digests), np.bool_)
        is_new[first[~known]] = True
        self._keep(ordered[~known])
        return is_new

    def _keep(self, run: Any) -> None:
        if not len(run):
            return
        while self._runs and len(self._runs[-1]) <= 2 * len(run):
            run = np.concatenate([self._runs.pop(), run])
            run.sort(kind="stable")  # which merges runs that are sorted already
        self._runs.append(run)


def _holds(run: Digests, digests: Digests) -> NDArray[np.bool_]:
    places = np.minimum(np.searchsorted(run, digests), len(run) - 1)
    found: NDArray[np.bool_] = run[places] == digests
    return found
