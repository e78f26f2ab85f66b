"""Charts: whole SVG whatever the values, real points kept, values that are not finite in sight."""

from __future__ import annotations

import math
import re
from typing import Any
from xml.etree import ElementTree

import pytest
from hypothesis import given, settings, strategies

from bigtrain.charts.axis import finite
from bigtrain.charts.lines import LONGEST_LINE, Chart, Line, Point, chart_data, draw, thin

values = strategies.one_of(strategies.floats(0, 1e38), strategies.sampled_from(["nan", "inf"]))


def chart(*points: Point, **keys: Any) -> Chart:
    return Chart("loss", "Loss", [Line("training", points)], **keys)


def parsed(drawn: Chart) -> ElementTree.Element:
    return ElementTree.fromstring(draw(drawn))


def tags(root: ElementTree.Element, tag: str, style: str = "") -> list[ElementTree.Element]:
    return [element for element in root.iter(tag) if not style or element.get("class") == style]


def coordinates(polyline: ElementTree.Element) -> list[tuple[float, float]]:
    pairs = polyline.attrib["points"].split()
    return [(float(pair.split(",")[0]), float(pair.split(",")[1])) for pair in pairs]


def test_short_lines_keep_all_points() -> None:
    points = [(step, float(step)) for step in range(LONGEST_LINE)]
    assert thin(points) == points


@settings(max_examples=50, deadline=None)
@given(strategies.lists(values, min_size=41, max_size=100), strategies.integers(10, 40))
def test_thinned_points_are_points_in_order(drawn: list[float | str], limit: int) -> None:
    points = list(enumerate(drawn))
    kept = thin(points, limit)
    assert len(kept) <= limit
    assert kept == sorted(set(kept) & set(points), key=lambda point: point[0])
    assert (kept[0], kept[-1]) == (points[0], points[-1])


def test_thinning_keeps_spikes() -> None:
    points: list[Point] = [(step, 1.0) for step in range(10_000)]
    points[4321], points[7000], points[8765] = (4321, 50.0), (7000, "nan"), (8765, 0.01)
    kept = thin(points)
    assert len(kept) <= LONGEST_LINE
    assert {points[4321], points[7000], points[8765]} <= set(kept)


def test_line_runs_from_left_to_right_and_upside_down() -> None:
    (line,) = tags(parsed(chart((10, 9.0), (20, 7.0), (30, 5.0))), "polyline")
    (x0, y0), (x1, y1), (x2, y2) = coordinates(line)
    assert x1 - x0 == pytest.approx(x2 - x1, abs=0.11)
    assert y1 - y0 == pytest.approx(y2 - y1, abs=0.11)
    assert x0 < x2
    assert y0 < y2


def test_one_point_is_a_dot() -> None:
    root = parsed(chart((1, 9.0)))
    assert len(tags(root, "circle")) == 1
    assert not tags(root, "polyline")


def test_dotted_lines_are_dots() -> None:
    root = parsed(Chart("loss", "Loss", [Line("evaluation", [(1, 9.0), (2, 8.0), (3, 7.0)], "second", dotted=True)]))
    assert len(tags(root, "circle", "second")) == 3
    assert not tags(root, "polyline")


def test_line_breaks_where_a_value_is_not_finite() -> None:
    root = parsed(chart((1, 5.0), (2, 4.0), (3, "nan"), (4, "inf"), (5, 4.0), (6, 3.0), (7, "nan"), (8, 3.0)))
    assert [len(coordinates(line)) for line in tags(root, "polyline")] == [2, 2]
    assert len(tags(root, "line", "bad")) == 3
    assert len(tags(root, "circle")) == 1


@settings(max_examples=50, deadline=None)
@given(strategies.lists(values, min_size=1, max_size=20), strategies.booleans(), strategies.booleans())
def test_any_values_give_a_whole_drawing(drawn: list[float | str], spiky: bool, zero_based: bool) -> None:
    root = parsed(chart(*enumerate(drawn), spiky=spiky, zero_based=zero_based))
    shown = draw(chart(*enumerate(drawn), spiky=spiky, zero_based=zero_based)).partition("</desc>")[2]
    assert not re.search(r'="(nan|-?inf)', shown)
    height = float(root.attrib["viewBox"].split()[-1])
    assert all(0 <= y <= height for line in tags(root, "polyline") for _, y in coordinates(line))


def test_nothing_finite_still_has_axes() -> None:
    root = parsed(chart((1, "nan"), (2, "nan")))
    assert len(tags(root, "line", "bad")) == 2
    assert tags(root, "line", "grid")


def test_spread_makes_spiky_charts_logarithmic() -> None:
    points = [(1, 1.0), (2, 1000.0), (3, 10.0)]
    (straight,), (bent,) = (tags(parsed(chart(*points, spiky=spiky)), "polyline") for spiky in (False, True))
    assert coordinates(straight)[2][1] - coordinates(straight)[1][1] > 150
    assert coordinates(bent)[2][1] < coordinates(straight)[2][1] - 50


def test_level_is_named_away_from_the_end_of_the_line() -> None:
    for end, above in ((4.0, True), (9.0, False)):
        root = parsed(chart((1, 8.0), (2, 2.0), (3, end), levels={"frequencies <alone>": 6.0}))
        (line,), (text,) = tags(root, "line", "level"), tags(root, "text", "level")
        assert text.text == "frequencies <alone>"
        assert (float(text.attrib["y"]) < float(line.attrib["y1"])) is above


def test_level_at_the_bottom_is_named_above_the_axis() -> None:
    root = parsed(chart((1, 8.0), (2, 7.0), levels={"frequencies": 5.0}))
    (line,), (text,) = tags(root, "line", "level"), tags(root, "text", "level")
    assert float(text.attrib["y"]) < float(line.attrib["y1"])


def test_bar_stands_on_the_same_axis() -> None:
    sizes = {"weights": 100, "optimizer_state": 300}
    root = parsed(chart((1, 200.0), (2, 200.0), unit="bytes", zero_based=True, bar=sizes))
    weights, state = tags(root, "rect")
    heights = [float(rect.attrib["height"]) for rect in (weights, state)]
    assert heights[1] == pytest.approx(3 * heights[0], abs=0.3)
    assert float(state.attrib["y"]) + heights[1] == pytest.approx(float(weights.attrib["y"]), abs=0.11)
    middle = float(weights.attrib["y"]) - heights[0]
    assert coordinates(tags(root, "polyline")[0])[0][1] == pytest.approx(middle, abs=0.3)
    right = max(x for x, _ in coordinates(tags(root, "polyline")[0]))
    assert float(weights.attrib["x"]) > right


def test_is_titled_and_described_for_readers_of_screens() -> None:
    root = parsed(chart((1, 9.5), (20, "nan"), levels={"unigram": 6.0}))
    assert root.attrib["role"] == "img"
    assert root.attrib["aria-labelledby"] == "loss-title"
    (text,) = tags(root, "desc")
    assert text.attrib["id"] == root.attrib["aria-describedby"]
    assert text.text == "training: 9.5 at step 1, nan at step 20; unigram: 6.0"


def test_data_hold_the_values_as_they_are() -> None:
    points: list[Point] = [(1, 1 / 3), (5, "nan"), (9, 1e-300)]
    data = chart_data(chart(*points))
    assert data["lines"] == [{"name": "training", "points": tuple(points)}]


def test_data_say_where_steps_lie() -> None:
    shown = chart((10, 1.0), (25, 2.0), (40, 3.0))
    first, last, left, right = chart_data(shown)["axis"]
    (line,) = tags(parsed(shown), "polyline")
    for step, (x, _) in zip((10, 25, 40), coordinates(line), strict=True):
        assert left + (right - left) * (step - first) / (last - first) == pytest.approx(x, abs=0.06)


def test_one_step_has_an_axis_too() -> None:
    first, last, left, right = chart_data(chart((7, 1.0)))["axis"]
    assert (first, last) == (6, 8)
    assert left < right
    assert all(math.isfinite(edge) for edge in (left, right))
    assert finite(first) is not None
