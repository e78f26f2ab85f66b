"""Where one part of a tensor lies in another part of it. No torch."""

from __future__ import annotations

import json
import math
from collections.abc import Iterator, Sequence
from itertools import product
from typing import NamedTuple

from bigtrain.sharding.part import Part, Shape


class Run(NamedTuple):
    """Elements that follow each other in two parts, both flat: from `source` in one, from `target` in the other."""

    source: int
    target: int
    length: int


def runs(source: Part, target: Part) -> Iterator[Run]:
    """Yield what two parts of a tensor have in common, in the order of the tensor; parts are contiguous, row by row."""
    bounds = zip(source.start, source.shape, target.start, target.shape, strict=True)
    ranges = [(max(a, b), min(a + m, b + n)) for a, m, b, n in bounds]
    if any(low >= high for low, high in ranges):
        return
    spread = _last_cut(ranges, source, target)
    length = math.prod(high - low for low, high in ranges[spread:])
    rest = [low for low, _ in ranges[spread:]]
    for outer in product(*(range(low, high) for low, high in ranges[:spread])):
        place = (*outer, *rest)
        yield Run(_offset(source, place), _offset(target, place), length)


def _last_cut(ranges: Sequence[tuple[int, int]], source: Part, target: Part) -> int:
    """Return the last dim of which the parts have not all in common; behind it, both are laid out alike."""
    for dim in reversed(range(len(ranges))):
        low, high = ranges[dim]
        if not high - low == source.shape[dim] == target.shape[dim]:
            return dim
    return 0


def _offset(part: Part, place: Sequence[int]) -> int:
    offset = 0
    for position, start, length in zip(place, part.start, part.shape, strict=True):
        offset = offset * length + position - start
    return offset


def to_text(part: Part) -> str:
    """Return a part as JSON."""
    return json.dumps(part, separators=(",", ":"))


def from_text(text: str) -> Part:
    """Return the part that `to_text` wrote. Raises ValueError for what is none."""
    found = json.loads(text)
    if not isinstance(found, list) or len(found) != 3 or not all(isinstance(shape, list) for shape in found):
        raise ValueError(f"{text}: not the whole shape, the start and the shape of a part")
    whole, start, shape = (_numbers(numbers) for numbers in found)
    if not len(whole) == len(start) == len(shape) or any(
        first + length > all_of_it for all_of_it, first, length in zip(whole, start, shape, strict=True)
    ):
        raise ValueError(f"{text}: a part that goes beyond its whole")
    return Part(whole, start, shape)


def _numbers(numbers: Sequence[object]) -> Shape:
    if not all(type(number) is int and number >= 0 for number in numbers):
        raise ValueError(f"{numbers}: a shape is of numbers from 0")
    return tuple(number for number in numbers if isinstance(number, int))
