"""What memory buys: predicted tokens per second against the memory budget, as text and as a picture."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import TYPE_CHECKING

from bigtrain.charts import palette, plot
from bigtrain.planner.choice import Choice
from bigtrain.planner.words import bar, short_choice
from bigtrain.units import format_bytes

if TYPE_CHECKING:
    from matplotlib.axes import Axes

    from bigtrain.planner.search import Point

BAR_WIDTH = 24

LONGEST_TEXT = 56
"""Letters of a choice in one line beside the picture."""


def frontier_lines(points: Sequence[Point]) -> Iterator[str]:
    """Yield a table of the points by budget: bars of predicted tokens per second, and the choice where it changes."""
    best = max((point.tokens_per_second or 0.0 for point in points), default=0.0)
    yield f"{'budget':>11}  {'tokens/s':>12}  {'':{BAR_WIDTH}}  choice"
    above = None
    for point in sorted(points, key=lambda point: point.budget_bytes):
        budget = f"{format_bytes(point.budget_bytes):>11}"
        if point.choice is None or point.tokens_per_second is None:
            yield f"{budget}  {'-':>12}  {'':{BAR_WIDTH}}  nothing fits"
            continue
        rate = point.tokens_per_second
        words = '"' if point.choice == above else short_choice(point.choice)
        above = point.choice
        yield f"{budget}  {rate:>12,.0f}  {bar(rate / best, BAR_WIDTH):{BAR_WIDTH}}  {words}"


def frontier_picture(points: Sequence[Point], path: Path, *, title: str = "") -> None:
    """Write the frontier as PNG: steps of tokens per second, each choice numbered and named beside.

    Raises InputError for a path that cannot be written.
    """
    ordered = sorted(points, key=lambda point: point.budget_bytes)
    drawn = plot.new_figure(11, 4.6)
    axes, key = drawn.subplots(1, 2, width_ratios=(3, 2))
    plot.tidy(axes, title or "Predicted tokens per second by memory budget")
    high = 1.12 * max((point.tokens_per_second or 0.0 for point in ordered), default=0.0) or 1.0
    plot.ticks(axes, "y", high, "count")
    plot.ticks(axes, "x", 1.04 * max((point.budget_bytes for point in ordered), default=1), "bytes", 6)
    _draw(axes, ordered, high)
    _name(key, choices(ordered))
    plot.save(drawn, path)


def choices(points: Sequence[Point]) -> list[Choice]:
    """Return the different choices of some points, in the order in which they first come."""
    return list(dict.fromkeys(point.choice for point in points if point.choice is not None))


def _draw(axes: Axes, points: Sequence[Point], high: float) -> None:
    fitting = [(point, point.tokens_per_second) for point in points if point.tokens_per_second is not None]
    too_small = [point.budget_bytes for point in points if point.tokens_per_second is None]
    if too_small:
        axes.axvspan(0, max(too_small), color=palette.LIGHT["grid"], linewidth=0)
        axes.annotate(
            "nothing fits", (max(too_small) / 2, high / 2), ha="center", va="center", rotation=90, fontsize=8.5
        )
    budgets, rates = [point.budget_bytes for point, _ in fitting], [rate for _, rate in fitting]
    axes.step(budgets, rates, where="post", color=palette.LIGHT["main"], linewidth=1.6)
    axes.plot(budgets, rates, "o", color=palette.LIGHT["main"], markersize=4)
    numbers = {choice: number for number, choice in enumerate(choices(points), 1)}
    seen: set[Choice | None] = set()
    for point, rate in fitting:
        if point.choice not in seen and point.choice is not None:
            text, place = str(numbers[point.choice]), (point.budget_bytes, rate)
            axes.annotate(text, place, (0, 7), textcoords="offset points", ha="center", fontsize=8.5)
        seen.add(point.choice)


def _name(axes: Axes, named: Sequence[Choice]) -> None:
    """Write the choices down beside the plot, wrapped to its width."""
    axes.set_axis_off()
    lines = "\n".join(f"{number}   {_wrapped(short_choice(choice))}" for number, choice in enumerate(named, 1))
    axes.text(
        0, 1, lines, va="top", fontsize=8.5, color=palette.LIGHT["text"], linespacing=1.5, transform=axes.transAxes
    )


def _wrapped(text: str) -> str:
    """Break a choice after about half of its parts where it is too long for one line."""
    parts = text.split(", ")
    if len(text) <= LONGEST_TEXT:
        return text
    half = (len(parts) + 1) // 2
    return ", ".join(parts[:half]) + ",\n     " + ", ".join(parts[half:])
