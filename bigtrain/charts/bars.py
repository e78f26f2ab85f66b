"""Pairs of bars, one above the other: what was measured beside what was expected of it."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING

from bigtrain.charts import plot
from bigtrain.charts.palette import LIGHT

if TYPE_CHECKING:
    from matplotlib.axes import Axes

PLACES = ((-0.2, 1.0), (0.2, 0.5))
"""Where the two bars of a pair stand beside its place, and how strong their colours are."""

ROOM = 1.22
"""Of the longest bar; its text stands behind it."""


@dataclass(frozen=True)
class Pair:
    """Two sizes of one thing, and how they read."""

    name: str
    first: float
    second: float
    first_text: str
    second_text: str


def pair_cells(pairs: Sequence[Pair]) -> list[str]:
    """Return for each pair its bars as HTML, all on one scale."""
    most = _most(pairs)
    return [
        "".join(f'<b class="bar" style="width:{max(0.0, size) / most:.2%}"></b>' for size in (pair.first, pair.second))
        for pair in pairs
    ]


def plot_pairs(axes: Axes, pairs: Sequence[Pair], title: str, note: str) -> None:
    """Draw the pairs from above to below, each bar with its text; the axis is without ticks."""
    plot.tidy(axes, title, grid="x", note=note)
    axes.set(xlim=(0.0, ROOM * _most(pairs)), xticks=[], ylim=(len(pairs) - 0.4, -0.6))
    axes.set(yticks=range(len(pairs)), yticklabels=[pair.name for pair in pairs])
    for row, pair in enumerate(pairs):
        sides = (pair.first, pair.first_text), (pair.second, pair.second_text)
        for (size, text), (offset, strength) in zip(sides, PLACES, strict=True):
            axes.barh(row + offset, size, height=0.36, color=LIGHT["main"], alpha=strength)
            place = (max(0.0, size), row + offset), (4, 0)
            axes.annotate(text, *place, textcoords="offset points", va="center", fontsize=7.5, color=LIGHT["text"])


def _most(pairs: Sequence[Pair]) -> float:
    return max((max(pair.first, pair.second) for pair in pairs), default=0.0) or 1.0
