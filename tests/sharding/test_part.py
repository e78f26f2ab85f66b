"""Parts of tensors: boxes, and runs of rows that are not neighbours."""

from __future__ import annotations

from hypothesis import given
from hypothesis import strategies as st

from bigtrain.sharding.part import Part

ROWS = 12


@st.composite
def runs(draw: st.DrawFn) -> list[tuple[int, int]]:
    """Draw runs of rows that follow each other, with or without a gap."""
    ends = sorted(draw(st.lists(st.integers(0, ROWS), max_size=6)))
    return [(first, end - first) for first, end in zip(ends[::2], ends[1::2], strict=False)]


def rows_of(part: Part) -> list[int]:
    return [row for box in part.boxes for row in range(box.start[0], box.start[0] + box.shape[0])]


@given(runs())
def test_a_part_has_the_rows_that_it_was_made_of(rows: list[tuple[int, int]]) -> None:
    part = Part.of_rows((ROWS, 3), rows)
    assert rows_of(part) == [row for first, count in rows for row in range(first, first + count)]
    assert part.shape == (len(rows_of(part)), 3)
    assert part.start[1:] == (0,)
    assert part.complete == (part == Part.of_whole((ROWS, 3)))


@given(runs(), st.integers(0, ROWS), st.integers(0, ROWS))
def test_some_of_its_rows_are_a_part_too(rows: list[tuple[int, int]], first: int, count: int) -> None:
    part = Part.of_rows((ROWS, 8), rows, (4,), (2,))
    narrowed = part.narrow(first, count)
    assert rows_of(narrowed) == rows_of(part)[first : first + count]
    assert (narrowed.start[1:], narrowed.shape[1:]) == ((4,), (2,))


def test_neighbours_are_one_box() -> None:
    assert Part.of_rows((ROWS,), [(2, 3), (5, 1), (6, 0)]) == Part((ROWS,), (2,), (4,))
    assert Part.of_rows((ROWS,), [(2, 3), (8, 1)]).rows == ((2, 3), (8, 1))


def test_no_rows_are_a_part() -> None:
    part = Part.of_rows((ROWS, 3), [])
    assert (part.shape, part.rows, part.boxes) == ((0, 3), (), [part])


def test_all_of_a_number() -> None:
    assert Part.of_whole(()).complete
    assert Part.of_whole(()).boxes == [Part.of_whole(())]
