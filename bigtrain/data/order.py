"""Which row stands at each place of the endless stream of rows: a pure function of the seed and the place."""

from __future__ import annotations

from bisect import bisect_left
from dataclasses import dataclass
from fractions import Fraction
from itertools import accumulate, pairwise

import numpy as np
from numpy.typing import NDArray

from bigtrain.data.corpus import Corpus, Split
from bigtrain.data.hashing import key_of
from bigtrain.data.packing import RowIndex
from bigtrain.data.shuffle import shuffled_many

Ids = NDArray[np.int64]

WHOLE_BITS = 24
WHOLE = 2**WHOLE_BITS
"""Parts into which a share is measured; times 2**39 rows, more than are ever read, it stays within 64 bits."""
_PHASE, _ROWS = 1, 2
"""What the seed's keys are for: where the interleaving begins, and the order of a source's rows."""


@dataclass(frozen=True)
class RowOrder:
    """The rows of all sources, each through all of its own once an epoch, newly shuffled each time.

    Of a mixture each source has its own epochs: one that is read through starts over, whatever the others do. The
    sources take turns as evenly as whole rows allow, so that each global batch holds every source's share.
    """

    bounds: tuple[int, ...]
    """The first row of each source that has any, and the number of rows."""
    shares: tuple[int, ...]
    """Of `WHOLE`, what a source takes of the places that the sources before it leave; the last one takes all."""
    seed: int

    @classmethod
    def of(cls, corpus: Corpus, split: Split, index: RowIndex, seed: int) -> RowOrder:
        """Return the order of the rows of a corpus, which lie source by source."""
        tokens = [0, *accumulate(source.corpus.counts(split).tokens for source in corpus.sources)][:-1] or [0]
        rows = range(len(index))
        firsts = [bisect_left(rows, token, key=lambda row: int(index.starts[index.offsets[row]])) for token in tokens]
        bounds = [*firsts, len(index)]
        weights = [source.weight for source in corpus.sources] or [1.0]
        held = [number for number, (first, end) in enumerate(pairwise(bounds)) if first < end]
        shares = shares_of([weights[number] for number in held])
        return cls((*(bounds[number] for number in held), len(index)), shares, seed)

    def rows_at(self, places: Ids) -> tuple[Ids, Ids]:
        """Return the row, and the epoch of its source, at each of these places; (B,) each."""
        if len(self.shares) == 1:
            return stream_rows(places, self.bounds[-1], self.seed)
        sources, turns = self._turns(places)
        rows, epochs = np.empty_like(places), np.empty_like(places)
        for source in np.unique(sources).tolist():
            here = sources == source
            first, end = self.bounds[source : source + 2]
            key = int(key_of(self.seed, _ROWS, source)[0])
            own, epochs[here] = stream_rows(turns[here], end - first, key)
            rows[here] = first + own
        return rows, epochs

    def _turns(self, places: Ids) -> tuple[Ids, Ids]:
        """Return whose turn each place is, and the how-manieth of that source, from 0."""
        sources, turns = np.empty_like(places), places.copy()
        left = np.arange(len(places))
        for source, share in enumerate(self.shares):
            phase = int(key_of(self.seed, _PHASE, source)[0]) % WHOLE
            taken, taken_next = ((turns[left] + further) * share + phase >> WHOLE_BITS for further in (0, 1))
            own = taken < taken_next
            sources[left[own]], turns[left[own]] = source, taken[own]
            turns[left[~own]] -= taken[~own]
            left = left[~own]
        return sources, turns


def stream_rows(places: Ids, rows: int, seed: int) -> tuple[Ids, Ids]:
    """Return the row, and the epoch, at each place of the endless stream of one source; (B,) each."""
    epochs, within = np.divmod(places, rows)
    found = np.empty_like(within)
    for epoch in np.unique(epochs).tolist():
        here = epochs == epoch
        found[here] = shuffled_many(within[here], rows, int(key_of(seed, epoch)[0]))
    return found, epochs


def shares_of(weights: list[float]) -> tuple[int, ...]:
    """Return `RowOrder.shares` of sources with these weights, none of which is left without any."""
    left = sum(map(Fraction, weights))
    shares = []
    for weight in weights[:-1]:
        shares.append(min(max(1, round(WHOLE * Fraction(weight) / left)), WHOLE - 1))
        left -= Fraction(weight)
    return (*shares, WHOLE)[: len(weights)]
