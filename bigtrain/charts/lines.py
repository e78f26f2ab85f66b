"""Line charts over the steps of a run, as inline SVG, and the same numbers for the page's script."""

from __future__ import annotations

import math
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, field
from html import escape
from typing import Any, TypeAlias

from bigtrain.charts.axis import Axis, Unit, finite

Value: TypeAlias = float | str
"""A number, or the text that stands for one that is not finite."""

Point: TypeAlias = tuple[int, Value]

LONGEST_LINE = 600
"""Points; more than a screen has columns for, and they make the page heavy."""

LOG_SPREAD = 100
"""Largest over smallest value from which a spiky chart is logarithmic: one spike would flatten the rest."""

LEFT, RIGHT, TOP, BOTTOM = 62.0, 16.0, 12.0, 28.0
"""Margins around the plot, in the units of the SVG, for the texts of the axes."""

BAR_WIDTH, BAR_SPACE = 40.0, 88.0


@dataclass(frozen=True)
class Line:
    """One series: its points in the order of steps, and the CSS class that it is drawn in, as dots or as a line."""

    name: str
    points: Sequence[Point]
    style: str = "main"
    dotted: bool = False


@dataclass(frozen=True)
class Chart:
    """Lines that share their axes, beside a stacked bar on the same vertical axis if there is one.

    `levels` are named horizontal lines. `zero_based` starts the vertical axis at zero; `spiky` makes it logarithmic
    when values spread wide. There is at least one line, and each has a point.
    """

    key: str
    title: str
    lines: Sequence[Line]
    unit: Unit = "number"
    levels: Mapping[str, float] = field(default_factory=dict)
    bar: Mapping[str, int] = field(default_factory=dict)
    zero_based: bool = False
    spiky: bool = False
    width: float = 528
    height: float = 230


def thin(points: Sequence[Point], limit: int = LONGEST_LINE) -> list[Point]:
    """Return at most so many of the points: the first, the last, and the extremes of each of equal stretches between.

    A value that is not finite counts as the highest, so that it stays in sight.
    """
    if len(points) <= limit:
        return list(points)
    stretches = limit // 2 - 1
    kept = {0, len(points) - 1}
    for index in range(stretches):
        stretch = range(len(points) * index // stretches, len(points) * (index + 1) // stretches)
        heights = {place: _height(points[place][1]) for place in stretch}
        kept |= {min(stretch, key=heights.__getitem__), max(stretch, key=heights.__getitem__)}
    return [points[place] for place in sorted(kept)]


def chart_data(chart: Chart) -> dict[str, Any]:
    """Return what the page's script needs to answer a pointer: where steps lie, and the values as they were logged."""
    steps = _step_axis(chart)
    return {
        "unit": chart.unit,
        "axis": [steps.low, steps.high, steps.start, steps.end],
        "width": chart.width,
        "lines": [{"name": line.name, "points": line.points} for line in chart.lines],
    }


def draw(chart: Chart) -> str:
    """Return a chart as an SVG element; its colours are the page's, and its title the page's element `KEY-title`."""
    steps, values, key = _step_axis(chart), _value_axis(chart), escape(chart.key)
    parts = [
        f'<svg viewBox="0 0 {chart.width:g} {chart.height:g}" role="img" tabindex="0" data-chart="{key}" '
        f'aria-labelledby="{key}-title" aria-describedby="{key}-text">',
        f'<desc id="{key}-text">{escape(_description(chart))}</desc>',
        *_value_ticks(values, steps),
        *_step_ticks(steps, values),
    ]
    for line in chart.lines:
        parts += _line(line, steps, values)
    parts += [_level(name, level, chart, steps, values) for name, level in chart.levels.items()]
    parts += _bar(chart, values)
    parts.append(f'<line class="cursor" y1="{values.end:g}" y2="{values.start:g}" visibility="hidden"/></svg>')
    return "\n".join(parts)


def _height(value: Value) -> float:
    number = finite(value)
    return math.inf if number is None else number


def _numbers(lines: Iterable[Line]) -> list[float]:
    return [number for line in lines for _, value in line.points if (number := finite(value)) is not None]


def _step_axis(chart: Chart) -> Axis:
    steps = [step for line in chart.lines for step, _ in line.points]
    first, last = min(steps), max(steps)
    if first == last:
        first, last = first - 1, last + 1
    return Axis(first, last, LEFT, chart.width - (BAR_SPACE if chart.bar else RIGHT), "step")


def _value_axis(chart: Chart) -> Axis:
    numbers = [*_numbers(chart.lines), *chart.levels.values()]
    if chart.bar:
        numbers.append(sum(chart.bar.values()))
    low, high = min(numbers, default=0.0), max(numbers, default=0.0)
    start, end = chart.height - BOTTOM, TOP
    if chart.spiky and low > 0 and high / low > LOG_SPREAD:
        return Axis(low / 1.3, high * 1.3, start, end, chart.unit, logarithmic=True)
    if chart.zero_based and low >= 0:
        return Axis(0.0, 1.06 * high or 1.0, start, end, chart.unit)
    margin = 0.06 * (high - low) or 0.05 * abs(high) or 1.0
    return Axis(low - margin, high + margin, start, end, chart.unit)


def _value_ticks(values: Axis, steps: Axis) -> Iterable[str]:
    for tick, text in values.ticks(5):
        y = values.at(tick)
        yield f'<line class="grid" x1="{steps.start:g}" x2="{steps.end:g}" y1="{y:.1f}" y2="{y:.1f}"/>'
        yield f'<text x="{steps.start - 8:g}" y="{y + 4:.1f}" text-anchor="end">{text}</text>'


def _step_ticks(steps: Axis, values: Axis) -> Iterable[str]:
    bottom = values.start
    yield f'<line class="axis" x1="{steps.start:g}" x2="{steps.end:g}" y1="{bottom:g}" y2="{bottom:g}"/>'
    for tick, text in steps.ticks(5 if steps.end < 600 else 8):
        x = steps.at(tick)
        yield f'<line class="axis" x1="{x:.1f}" x2="{x:.1f}" y1="{bottom:g}" y2="{bottom + 4:g}"/>'
        yield f'<text x="{x:.1f}" y="{bottom + 18:g}" text-anchor="middle">{text}</text>'


def _line(line: Line, steps: Axis, values: Axis) -> Iterable[str]:
    """Draw a series, broken where a value is not finite; such a value is a mark at the bottom, a lone one a dot."""
    stretches: list[list[tuple[float, float]]] = [[]]
    for step, value in line.points:
        number, x = finite(value), steps.at(step)
        if number is None:
            yield f'<line class="bad" x1="{x:.1f}" x2="{x:.1f}" y1="{values.start:g}" y2="{values.start - 12:g}"/>'
            stretches.append([])
        else:
            stretches[-1].append((x, values.at(number)))
    for stretch in stretches:
        if line.dotted or len(stretch) == 1:
            yield from (f'<circle class="{line.style}" cx="{x:.1f}" cy="{y:.1f}" r="3.5"/>' for x, y in stretch)
        elif stretch:
            yield f'<polyline class="{line.style}" points="{" ".join(f"{x:.1f},{y:.1f}" for x, y in stretch)}"/>'


def _level(name: str, level: float, chart: Chart, steps: Axis, values: Axis) -> str:
    """Draw a named level; its text stands where the last line does not end and the axis is not."""
    numbers = _numbers(chart.lines[-1:])
    y = values.at(level)
    is_above = bool(numbers and numbers[-1] < level) or y + 20 > values.start
    text_y = y - 6 if is_above else y + 15
    return (
        f'<line class="level" x1="{steps.start:g}" x2="{steps.end:g}" y1="{y:.1f}" y2="{y:.1f}"/>'
        f'<text class="level" x="{steps.end - 4:g}" y="{text_y:.1f}" text-anchor="end">{escape(name)}</text>'
    )


def _bar(chart: Chart, values: Axis) -> Iterable[str]:
    x, below = chart.width - RIGHT - BAR_WIDTH - 10, 0
    for index, (name, size) in enumerate(chart.bar.items()):
        top, bottom = values.at(below + size), values.at(below)
        below += size
        yield (
            f'<rect class="cause-{index}" x="{x:g}" y="{top:.1f}" width="{BAR_WIDTH:g}" height="{bottom - top:.1f}">'
            f"<title>{escape(name)}: {size:,} bytes</title></rect>"
        )
    if chart.bar:
        yield f'<text x="{x + BAR_WIDTH / 2:g}" y="{values.at(below) - 6:.1f}" text-anchor="middle">planned</text>'


def _description(chart: Chart) -> str:
    parts = []
    for line in chart.lines:
        (first, start), (last, end) = line.points[0], line.points[-1]
        parts.append(f"{line.name}: {start} at step {first}, {end} at step {last}")
    return "; ".join(parts + [f"{name}: {level}" for name, level in chart.levels.items()])
