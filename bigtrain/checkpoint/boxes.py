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
    """Yield what two parts of a tensor have in common, in the order of their boxes; each is contiguous, row by row."""
    for (before, own), (ahead, wanted) in product(_placed(source), _placed(target)):
        for run in _common(own, wanted):
            yield Run(before + run.source, ahead + run.target, run.length)


def _placed(part: Part) -> Iterator[tuple[int, Part]]:
    """Yield the boxes of a part, each with the number of elements before it."""
    before = 0
    for box in part.boxes:
        yield before, box
        before += math.prod(box.shape)


def _common(source: Part, target: Part) -> Iterator[Run]:
    """Yield what two boxes have in common, in the order of the tensor."""
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
    """Return a part as JSON; a box has no list of rows."""
    return json.dumps(part if part.rows else part[:3], separators=(",", ":"))


def from_text(text: str) -> Part:
    """Return the part that `to_text` wrote. Raises ValueError for what is none."""
    found = json.loads(text)
    if not isinstance(found, list) or len(found) not in (3, 4) or not all(isinstance(shape, list) for shape in found):
        raise ValueError(f"{text}: not the whole shape, the start, the shape and the rows of a part")
    whole, start, shape = (_numbers(numbers) for numbers in found[:3])
    if found[3:]:
        return _of_rows(text, whole, start, shape, found[3])
    if not len(whole) == len(start) == len(shape) or any(
        first + length > all_of_it for all_of_it, first, length in zip(whole, start, shape, strict=True)
    ):
        raise ValueError(f"{text}: a part that goes beyond its whole")
    return Part(whole, start, shape)


def _of_rows(text: str, whole: Shape, start: Shape, shape: Shape, runs: Sequence[Sequence[object]]) -> Part:
    """Return the part whose rows are these runs. Raises ValueError where they are not those of its shape."""
    rows = [_numbers(run) for run in runs]
    if any(len(run) != 2 or sum(run) > whole[0] for run in rows) or any(
        first + length > all_of_it for all_of_it, first, length in zip(whole[1:], start[1:], shape[1:], strict=True)
    ):
        raise ValueError(f"{text}: a part that goes beyond its whole")
    part = Part.of_rows(whole, [(run[0], run[1]) for run in rows], start[1:], shape[1:])
    if (part.start, part.shape) != (start, shape):
        raise ValueError(f"{text}: rows that are not those of its shape")
    return part


def _numbers(numbers: Sequence[object]) -> Shape:
    if not all(type(number) is int and number >= 0 for number in numbers):
        raise ValueError(f"{numbers}: a shape is of numbers from 0")
    return tuple(number for number in numbers if isinstance(number, int))
