"""Parts of tensors in other parts: what torch's own slicing says."""

from __future__ import annotations

import math

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from torch import Tensor

from bigtrain.checkpoint.boxes import Run, from_text, runs, to_text
from bigtrain.sharding.part import Part

SHAPES = st.lists(st.integers(1, 5), max_size=3).map(tuple)


@st.composite
def parts_of(draw: st.DrawFn, whole: tuple[int, ...]) -> Part:
    start = tuple(draw(st.integers(0, length)) for length in whole)
    shape = tuple(draw(st.integers(0, length - first)) for length, first in zip(whole, start, strict=True))
    return Part(whole, start, shape)


@st.composite
def pairs(draw: st.DrawFn) -> tuple[Part, Part]:
    whole = draw(SHAPES)
    return draw(parts_of(whole)), draw(parts_of(whole))


def numbered(part: Part) -> Tensor:
    """Return a part of a tensor whose elements are their own numbers."""
    tensor = torch.arange(math.prod(part.whole)).reshape(part.whole)
    for dim, (start, length) in enumerate(zip(part.start, part.shape, strict=True)):
        tensor = tensor.narrow(dim, start, length)
    return tensor.reshape(-1)


@given(pairs())
def test_every_common_element_is_copied_once_to_its_place(pair: tuple[Part, Part]) -> None:
    source, target = pair
    have, want = numbered(source), numbered(target)
    copied = torch.full_like(want, -1)
    for run in runs(source, target):
        here = copied[run.target : run.target + run.length]
        assert run.length > 0
        assert bool((here == -1).all())
        here.copy_(have[run.source : run.source + run.length])
    common = torch.isin(want, have)
    assert torch.equal(copied[common], want[common])
    assert bool((copied[~common] == -1).all())


@given(SHAPES)
def test_all_of_a_tensor_is_one_run(whole: tuple[int, ...]) -> None:
    part = Part.of_whole(whole)
    assert list(runs(part, part)) == [Run(0, 0, math.prod(whole))]


def test_rows_are_one_run_and_columns_one_a_row() -> None:
    whole = (8, 6)
    rows, columns = Part(whole, (2, 0), (4, 6)), Part(whole, (0, 3), (8, 2))
    assert list(runs(Part.of_whole(whole), rows)) == [Run(12, 0, 24)]
    assert list(runs(Part(whole, (4, 0), (4, 6)), rows)) == [Run(0, 12, 12)]
    assert list(runs(rows, columns)) == [Run(6 * i + 3, 4 + 2 * i, 2) for i in range(4)]


def test_no_rows_have_nothing_in_common() -> None:
    assert list(runs(Part.of_whole((4, 3)), Part((4, 3), (4, 0), (0, 3)))) == []


@given(pairs())
def test_a_part_is_the_same_from_its_text(pair: tuple[Part, Part]) -> None:
    assert from_text(to_text(pair[0])) == pair[0]


@pytest.mark.parametrize(
    "text",
    ["{}", "[]", "[1,2,3]", "[[4],[2],[3]]", "[[4],[0]]", "[[4],[0],[4,1]]", '[["4"],[0],[4]]', "[[4],[-1],[2]]", "x"],
)
def test_what_is_no_part_is_refused(text: str) -> None:
    with pytest.raises(ValueError):
        from_text(text)


@st.composite
def scattered(draw: st.DrawFn, whole: tuple[int, ...]) -> Part:
    """Draw a part whose rows may lie apart."""
    ends = sorted(draw(st.lists(st.integers(0, whole[0]), max_size=6)))
    rows = [(first, end - first) for first, end in zip(ends[::2], ends[1::2], strict=False)]
    box = draw(parts_of(whole))
    return Part.of_rows(whole, rows, box.start[1:], box.shape[1:])


def of_boxes(part: Part) -> Tensor:
    return torch.cat([numbered(box) for box in part.boxes])


@given(st.lists(st.integers(1, 5), min_size=1, max_size=3).map(tuple).flatmap(lambda s: st.tuples(*[scattered(s)] * 2)))
def test_rows_that_lie_apart_are_copied_once_too(pair: tuple[Part, Part]) -> None:
    source, target = pair
    have, want = of_boxes(source), of_boxes(target)
    copied = torch.full_like(want, -1)
    for run in runs(source, target):
        copied[run.target : run.target + run.length] = have[run.source : run.source + run.length]
    assert torch.equal(copied, torch.where(torch.isin(want, have), want, -1))
    assert [from_text(to_text(part)) for part in pair] == list(pair)


@pytest.mark.parametrize(
    "text",
    ["[[4],[0],[2],[[0,1]]]", "[[4],[0],[2],[[0,1],[3,2]]]", "[[4],[0],[2],[[0],[1]]]", "[[4],[0],[2],[[-1,1]]]"],
)
def test_rows_that_are_not_those_of_the_shape_are_refused(text: str) -> None:
    with pytest.raises(ValueError):
        from_text(text)
