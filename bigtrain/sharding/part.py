"""The part of a parameter that a rank keeps. No torch."""

from __future__ import annotations

from collections.abc import Iterable
from typing import NamedTuple

Shape = tuple[int, ...]

Rows = tuple[tuple[int, int], ...]
"""Runs of rows that follow each other: the first of each, and how many."""


class Part(NamedTuple):
    """A box of a tensor of shape `whole`: from `start`, of shape `shape`; a number of rows 0 where a rank has none.

    Where its rows are not neighbours, `rows` has the runs that they are of, in their order; `start` is that of the
    first.
    """

    whole: Shape
    start: Shape
    shape: Shape
    rows: Rows = ()

    @property
    def complete(self) -> bool:
        """Tell whether it is all of the tensor."""
        return self.shape == self.whole

    @classmethod
    def of_whole(cls, shape: Shape) -> Part:
        """Return all of a tensor."""
        return cls(shape, (0,) * len(shape), shape)

    @classmethod
    def of_rows(cls, whole: Shape, rows: Iterable[tuple[int, int]], start: Shape = (), shape: Shape = ()) -> Part:
        """Return runs of rows, and of the dims behind them all, or from `start` so many as `shape` says."""
        start, shape = start or (0,) * (len(whole) - 1), shape or whole[1:]
        runs: list[tuple[int, int]] = []
        for first, count in rows:
            if runs and sum(runs[-1]) == first:
                runs[-1] = (runs[-1][0], runs[-1][1] + count)
            elif count:
                runs.append((first, count))
        first = runs[0][0] if runs else 0
        return cls(whole, (first, *start), (sum(count for _, count in runs), *shape), tuple(runs) if runs[1:] else ())

    @property
    def boxes(self) -> list[Part]:
        """Return the boxes that it is of, in the order in which it has their rows."""
        if not self.rows:
            return [self]
        behind = (self.start[1:], self.shape[1:])
        return [Part.of_rows(self.whole, [run], *behind) for run in self.rows]

    def narrow(self, first: int, count: int) -> Part:
        """Return so many of its rows from the `first` of its own."""
        found, skipped = [], first
        for start, length in self.rows or ((self.start[0], self.shape[0]),):
            taken = min(length - skipped, count)
            if taken > 0:
                found.append((start + skipped, taken))
                count -= taken
            skipped = max(0, skipped - length)
        return Part.of_rows(self.whole, found, self.start[1:], self.shape[1:])
