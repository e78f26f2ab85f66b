"""A stack of areas along a step, as inline SVG: each level holds until the next position."""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from html import escape
from itertools import pairwise
from typing import Any

from bigtrain.charts.axis import Axis

LEFT, RIGHT, TOP, BOTTOM = 66.0, 14.0, 24.0, 28.0
"""Margins around the plot, in the units of the SVG, for the texts of the axes and the names of the bands."""

HEADROOM = 1.14
"""Of the highest stack; the peak's name stands above it."""

LETTER_WIDTH = 7.0
"""About what a letter of the names takes, in the units of the SVG."""


@dataclass(frozen=True)
class Stack:
    """Areas upon each other. `layers` are heights in bytes by CSS class, the lowest first, one for each position.

    Positions are shares of a step, from 0 to 1 in rising order, at least one. `bands` are where parts of it begin, with
    their names. The vertical axis has room for `high`, so that two stacks can be compared. `peak` names the highest.
    """

    key: str
    positions: Sequence[float]
    layers: Mapping[str, Sequence[int]]
    bands: Sequence[tuple[float, str]]
    high: int
    peak: str
    width: float = 1088
    height: float = 270

    @property
    def totals(self) -> list[int]:
        """Return the height of the whole stack at each position."""
        return [sum(heights) for heights in zip(*self.layers.values(), strict=True)]


def stack_data(stack: Stack) -> dict[str, Any]:
    """Return what the page's script needs to find a position: where positions lie in the SVG."""
    positions = _position_axis(stack)
    return {"axis": [positions.low, positions.high, positions.start, positions.end], "width": stack.width}


def draw_stack(stack: Stack) -> str:
    """Return a stack as an SVG element; its colours are the page's, and its title the page's element `KEY-title`."""
    positions, sizes, key = _position_axis(stack), _size_axis(stack), escape(stack.key)
    totals = stack.totals
    parts = [
        f'<svg viewBox="0 0 {stack.width:g} {stack.height:g}" role="img" tabindex="0" data-stack="{key}" '
        f'aria-labelledby="{key}-title" aria-describedby="{key}-text">',
        f'<desc id="{key}-text">{escape(stack.peak)}, {max(totals):,} bytes</desc>',
        *_ticks(positions, sizes),
        *_areas(stack, positions, sizes),
        *_bands(stack, positions, sizes),
        *_peak(stack, totals, positions, sizes),
        f'<line class="cursor" y1="{sizes.end:g}" y2="{sizes.start:g}" visibility="hidden"/></svg>',
    ]
    return "\n".join(parts)


def outline(positions: Sequence[float], heights: Sequence[int]) -> Iterator[tuple[float, int]]:
    """Yield where the level of a stack changes and to what, neighbours of the same height as one."""
    last = None
    for position, height in zip(positions, heights, strict=True):
        if height != last:
            yield position, height
        last = height


def _position_axis(stack: Stack) -> Axis:
    return Axis(0.0, 1.0, LEFT, stack.width - RIGHT, "share")


def _size_axis(stack: Stack) -> Axis:
    return Axis(0.0, HEADROOM * stack.high or 1.0, stack.height - BOTTOM, TOP, "bytes")


def _ticks(positions: Axis, sizes: Axis) -> Iterator[str]:
    left, right, bottom = positions.start, positions.end, sizes.start
    for tick, text in sizes.ticks(5):
        y = sizes.at(tick)
        yield f'<line class="grid" x1="{left:g}" x2="{right:g}" y1="{y:.1f}" y2="{y:.1f}"/>'
        yield f'<text x="{left - 8:g}" y="{y + 4:.1f}" text-anchor="end">{text}</text>'
    yield f'<line class="axis" x1="{left:g}" x2="{right:g}" y1="{bottom:g}" y2="{bottom:g}"/>'
    for tick, text in positions.ticks(10):
        x = positions.at(tick)
        yield f'<line class="axis" x1="{x:.1f}" x2="{x:.1f}" y1="{bottom:g}" y2="{bottom + 4:g}"/>'
        yield f'<text x="{x:.1f}" y="{bottom + 18:g}" text-anchor="middle">{text}</text>'


def _areas(stack: Stack, positions: Axis, sizes: Axis) -> Iterator[str]:
    """Draw the areas from zero up, the highest first, so that each covers all below its own band."""
    drawn = []
    heights = [0] * len(stack.positions)
    for style, layer in stack.layers.items():
        heights = [below + size for below, size in zip(heights, layer, strict=True)]
        steps = "".join(
            f"H{positions.at(position):.1f}V{sizes.at(height):.1f}"
            for position, height in outline(stack.positions, heights)
        )
        path = f"M{positions.start:g} {sizes.start:g}{steps}H{positions.end:g}V{sizes.start:g}Z"
        if any(layer):
            drawn.append(f'<path class="area {style}" d="{path}"/>')
    yield from reversed(drawn)


def _bands(stack: Stack, positions: Axis, sizes: Axis) -> Iterator[str]:
    """Name the parts of the step above the plot, those that are wide enough for their name."""
    for (begin, name), (end, _) in pairwise([*stack.bands, (1.0, "")]):
        left, right = positions.at(begin), positions.at(end)
        if left > positions.start + 1:
            yield f'<line class="band" x1="{left:.1f}" x2="{left:.1f}" y1="{sizes.end - 16:g}" y2="{sizes.start:g}"/>'
        if right - left > LETTER_WIDTH * len(name) + 8:
            yield f'<text x="{left + 5:.1f}" y="{sizes.end - 6:g}">{escape(name)}</text>'


def _peak(stack: Stack, totals: Sequence[int], positions: Axis, sizes: Axis) -> Iterator[str]:
    most = max(totals)
    x, y = positions.at(stack.positions[totals.index(most)]), sizes.at(most)
    on_the_right = x + 12 + LETTER_WIDTH * len(stack.peak) < positions.end
    text_x, anchor = (x - 4, "start") if on_the_right else (x + 4, "end")
    yield f'<circle class="peak" cx="{x:.1f}" cy="{y:.1f}" r="4"/>'
    yield f'<text class="level" x="{text_x:.1f}" y="{y - 9:.1f}" text-anchor="{anchor}">{escape(stack.peak)}</text>'
