"""Pairs of bars: one scale, a bar and a text for each size, in a page and in a picture."""

from __future__ import annotations

from bigtrain.charts import plot
from bigtrain.charts.bars import PLACES, Pair, pair_cells, plot_pairs

PAIRS = [Pair("products", 4.0, 2.0, "4 ms", "2 ms"), Pair("calls", 1.0, 0.0, "1 ms", "none")]


def test_cells_are_on_one_scale() -> None:
    first, second = pair_cells(PAIRS)
    assert first == '<b class="bar" style="width:100.00%"></b><b class="bar" style="width:50.00%"></b>'
    assert "width:25.00%" in second and "width:0.00%" in second


def test_no_pairs_and_nothing_in_them_divide_by_nothing() -> None:
    assert pair_cells([]) == []
    assert "width:0.00%" in pair_cells([Pair("none", 0.0, 0.0, "", "")])[0]


def test_each_size_is_a_bar_with_its_text() -> None:
    axes = plot.new_figure(4, 3).subplots()
    plot_pairs(axes, PAIRS, "Time", "measured above")
    assert [bar.get_width() for bar in axes.patches] == [4.0, 2.0, 1.0, 0.0]
    assert [text.get_text() for text in axes.texts] == ["4 ms", "2 ms", "1 ms", "none"]
    assert [label.get_text() for label in axes.get_yticklabels()] == ["products", "calls"]
    assert [bar.get_alpha() for bar in axes.patches[:2]] == [strength for _, strength in PLACES]
