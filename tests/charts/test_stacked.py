"""Stacks: each area as high as its sizes say, levels held until the next position, names that do not collide."""

from __future__ import annotations

import re
from itertools import pairwise
from typing import Any
from xml.etree import ElementTree

import pytest
from hypothesis import given, settings, strategies

from bigtrain.charts.stacked import HEADROOM, Stack, draw_stack, outline, stack_data

MIB = 2**20

columns = strategies.lists(
    strategies.tuples(strategies.integers(0, 2**45), strategies.integers(0, 2**45)), min_size=1, max_size=30
)


def stack(*rows: tuple[int, ...], **keys: Any) -> Stack:
    """Return a stack of rows at equal distances, their numbers from the lowest layer to the highest."""
    layers = {f"cause-{place}": list(sizes) for place, sizes in enumerate(zip(*rows, strict=True))}
    positions = [place / len(rows) for place in range(len(rows))]
    high = max(map(sum, rows))
    given = {"key": "predicted", "positions": positions, "bands": [], "high": high, "peak": "peak", **keys}
    return Stack(layers=layers, **given)


def parsed(drawn: Stack) -> ElementTree.Element:
    return ElementTree.fromstring(draw_stack(drawn))


def areas(drawn: Stack) -> dict[str, list[tuple[float, float]]]:
    """Return the corners of each area by class, in the order in which they are drawn."""
    found = {}
    for path in parsed(drawn).iter("path"):
        x = y = 0.0
        corners = []
        for command, numbers in re.findall(r"([MHVZ])([\d. -]*)", path.attrib["d"]):
            if command == "M":
                x, y = map(float, numbers.split())
            elif command == "H":
                x = float(numbers)
            elif command == "V":
                y = float(numbers)
            corners.append((x, y))
        found[path.attrib["class"].split()[1]] = corners
    return found


def level(corners: list[tuple[float, float]], x: float) -> float:
    """Return how high an area is at x, in pixels from the bottom."""
    return corners[0][1] - min(y for (left, y), (right, also) in pairwise(corners) if y == also and left <= x <= right)


def test_areas_are_as_high_as_the_sizes_below_them() -> None:
    drawn = areas(stack((100, 300), (100, 100)))
    assert list(drawn) == ["cause-1", "cause-0"]
    assert level(drawn["cause-1"], 200) == pytest.approx(4 * level(drawn["cause-0"], 200), abs=0.2)
    assert level(drawn["cause-1"], 900) == pytest.approx(2 * level(drawn["cause-0"], 900), abs=0.2)


def test_levels_hold_until_the_next_position() -> None:
    (corners,) = areas(stack((100,), (50,), (100,), (100,))).values()
    left, _, start, end = stack_data(stack((1,)))["axis"]
    assert left == 0
    changes = [start, start + (end - start) / 4, start + (end - start) / 2, end]
    assert sorted({x for x, _ in corners}) == pytest.approx(changes, abs=0.06)


def test_causes_that_hold_nothing_are_not_drawn() -> None:
    assert list(areas(stack((0, 5, 0), (0, 7, 0)))) == ["cause-1"]


def test_two_stacks_can_share_their_scale() -> None:
    small, large = (level(areas(stack((size,), high=1000))["cause-0"], 500) for size in (500, 1000))
    assert large == pytest.approx(2 * small, abs=0.2)
    assert large == pytest.approx((270 - 24 - 28) / HEADROOM, abs=0.1)


@settings(max_examples=50, deadline=None)
@given(columns)
def test_any_sizes_give_a_whole_drawing(rows: list[tuple[int, int]]) -> None:
    drawn = stack(*rows)
    root = parsed(drawn)
    _, _, width, height = map(float, root.attrib["viewBox"].split())
    for corners in areas(drawn).values():
        assert all(0 <= x <= width and 0 <= y <= height for x, y in corners)
    (dot,) = root.iter("circle")
    (named,) = (text for text in root.iter("text") if text.get("class") == "level")
    assert 0 < float(named.attrib["y"]) < float(dot.attrib["cy"])


def test_peak_is_marked_where_it_is_first() -> None:
    root = parsed(stack((1,), (8,), (3,), (8,), peak="peak <8 B>"))
    (dot,) = root.iter("circle")
    _, _, start, end = stack_data(stack((1,)))["axis"]
    assert float(dot.attrib["cx"]) == pytest.approx(start + (end - start) / 4, abs=0.06)
    assert "peak <8 B>" in [text.text for text in root.iter("text")]


@pytest.mark.parametrize(("rows", "anchor"), [(((8,), (1,)), "start"), (((1,),) * 30 + ((8,),), "end")])
def test_peak_is_named_inside(rows: tuple[tuple[int]], anchor: str) -> None:
    root = parsed(stack(*rows, peak="peak 8 B, blocks.23 backward"))
    (text,) = (text for text in root.iter("text") if text.get("class") == "level")
    assert text.attrib["text-anchor"] == anchor


def test_bands_are_named_where_there_is_room() -> None:
    root = parsed(stack((1,), (2,), bands=[(0.0, "forward"), (0.5, "backward"), (0.99, "update")]))
    texts = [text.text for text in root.iter("text")]
    assert "forward" in texts
    assert "backward" in texts
    assert "update" not in texts
    assert len([line for line in root.iter("line") if line.get("class") == "band"]) == 2


def test_data_say_where_positions_lie() -> None:
    data = stack_data(stack((1,), (2,)))
    assert data["width"] == 1088
    assert data["axis"][:2] == [0.0, 1.0]


def test_is_titled_and_described_for_readers_of_screens() -> None:
    root = parsed(stack((5 * MIB,), peak="peak 5.00 MiB"))
    assert (root.attrib["role"], root.attrib["aria-labelledby"]) == ("img", "predicted-title")
    (text,) = root.iter("desc")
    assert text.attrib["id"] == root.attrib["aria-describedby"]
    assert text.text == "peak 5.00 MiB, 5,242,880 bytes"


def test_outline_joins_neighbours_of_the_same_height() -> None:
    assert list(outline([0.0, 0.1, 0.2, 0.3], [5, 5, 7, 5])) == [(0.0, 5), (0.2, 7), (0.3, 5)]
