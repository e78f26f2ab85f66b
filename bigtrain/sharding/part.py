"""The part of a parameter that a rank keeps. No torch."""

from __future__ import annotations

from typing import NamedTuple

Shape = tuple[int, ...]


class Part(NamedTuple):
    """A box of a tensor of shape `whole`: from `start`, of shape `shape`; a number of rows 0 where a rank has none."""

    whole: Shape
    start: Shape
    shape: Shape

    @property
    def complete(self) -> bool:
        """Tell whether it is all of the tensor."""
        return self.shape == self.whole

    @classmethod
    def of_whole(cls, shape: Shape) -> Part:
        """Return all of a tensor."""
        return cls(shape, (0,) * len(shape), shape)
