"""Pictures: the pages' ticks and colours, written without a screen, an unwritable path in words."""

from __future__ import annotations

from pathlib import Path

import pytest
from matplotlib import colors

from bigtrain.charts import plot
from bigtrain.charts.axis import Axis
from bigtrain.charts.palette import LIGHT
from bigtrain.errors import InputError

SIGNATURE = b"\x89PNG\r\n\x1a\n"
"""The first bytes of a PNG file (RFC 2083, section 3.1)."""


def test_a_figure_is_written(tmp_path: Path) -> None:
    figure = plot.new_figure(2, 1)
    plot.save(figure, tmp_path / "picture")
    content = (tmp_path / "picture").read_bytes()
    assert content.startswith(SIGNATURE)
    width, height = (int.from_bytes(content[place : place + 4], "big") for place in (16, 20))
    assert (width, height) == (2 * plot.DOTS_PER_INCH, plot.DOTS_PER_INCH)


def test_a_path_that_cannot_be_written_is_the_users(tmp_path: Path) -> None:
    with pytest.raises(InputError, match=r"command line: .*absent.x\.png: No such file or directory; name another"):
        plot.save(plot.new_figure(1, 1), tmp_path / "absent" / "x.png")


def test_ticks_are_the_pages() -> None:
    axes = plot.new_figure(3, 2).subplots()
    plot.ticks(axes, "y", 3 * 2**30, "bytes")
    wanted = Axis(0, 3 * 2**30, 0, 1, "bytes").ticks(5)
    assert [label.get_text() for label in axes.get_yticklabels()] == [text for _, text in wanted]
    assert list(axes.get_yticks()) == [value for value, _ in wanted]
    assert axes.get_ylim() == (0, 3 * 2**30)


@pytest.mark.parametrize(("grid", "shown"), [("y", "bottom"), ("x", "left")])
def test_one_side_of_the_frame_stays(grid: str, shown: str) -> None:
    axes = plot.new_figure(3, 2).subplots()
    plot.tidy(axes, "Memory", grid=grid, note="paler")  # type: ignore[arg-type]
    assert [side for side, spine in axes.spines.items() if spine.get_visible()] == [shown]
    assert (axes.get_title(loc="left"), axes.get_title(loc="right")) == ("Memory", "paler")


def test_colours_are_the_pages() -> None:
    figure = plot.new_figure(3, 2)
    assert figure.get_facecolor() == colors.to_rgba(LIGHT["card"])
