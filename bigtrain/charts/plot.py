"""What pictures have in common with pages: colours, ticks, no frames. matplotlib is imported only to draw."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING, Literal

from bigtrain.charts.axis import Axis, Unit
from bigtrain.charts.palette import LIGHT
from bigtrain.errors import InputError

if TYPE_CHECKING:
    from matplotlib.axes import Axes
    from matplotlib.figure import Figure

DOTS_PER_INCH = 150

PAD = 18
"""Points between a plot and its title: the names of its parts stand there."""


def new_figure(width: float, height: float) -> Figure:
    """Return an empty figure of so many inches, which draws without a screen whatever backend is set."""
    from matplotlib.figure import Figure

    return Figure(figsize=(width, height), facecolor=LIGHT["card"], layout="constrained")


def tidy(axes: Axes, title: str, *, grid: Literal["x", "y"] = "y", note: str = "") -> None:
    """Title a plot, with a note on the right; of its frame only the axis stays that its values stand on."""
    axes.set_title(title, loc="left", fontsize=10, fontweight="bold", color=LIGHT["text"], pad=PAD)
    axes.set_title(note, loc="right", fontsize=8.5, color=LIGHT["quiet"], pad=PAD)
    for side, spine in axes.spines.items():
        spine.set_visible(side == ("bottom" if grid == "y" else "left"))
        spine.set_color(LIGHT["quiet"])
    axes.tick_params(colors=LIGHT["quiet"], labelsize=8.5, length=3)
    axes.tick_params(axis="y" if grid == "y" else "x", length=0)
    axes.grid(axis=grid, color=LIGHT["grid"], linewidth=0.8)
    axes.set_axisbelow(True)


def ticks(axes: Axes, side: str, high: float, unit: Unit, count: int = 5) -> None:
    """Let an axis, `x` or `y`, run from zero to `high` with the round ticks that the pages have."""
    marks = Axis(0.0, high, 0.0, 1.0, unit).ticks(count)
    axes.set(**{f"{side}lim": (0.0, high)})
    axes.set(**{f"{side}ticks": [value for value, _ in marks], f"{side}ticklabels": [text for _, text in marks]})


def save(figure: Figure, path: Path) -> None:
    """Write a figure as PNG. Raises InputError for a path that cannot be written."""
    try:
        figure.savefig(path, format="png", dpi=DOTS_PER_INCH)
    except OSError as error:
        raise InputError(f"command line: {path}: {error.strerror}; name another file") from error
