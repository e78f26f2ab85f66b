"""Where the time of a step goes, as a page that needs no network, and as a picture: a pair of bars for each class."""

from __future__ import annotations

from collections.abc import Iterator
from html import escape
from importlib import resources
from pathlib import Path
from typing import TYPE_CHECKING

from bigtrain.charts import plot
from bigtrain.charts.axis import short_seconds
from bigtrain.charts.bars import Pair, pair_cells, plot_pairs
from bigtrain.charts.elements import details, figure, fill, html_table, json_in_html, words
from bigtrain.charts.palette import LIGHT

if TYPE_CHECKING:
    from bigtrain.profiling.time_result import TimeProfile

HEADER = ("", "", "measured", "share", "predicted", "gap", "of the roofline")


def page(profile: TimeProfile) -> str:
    """Return the profile as one page; the numbers in its element `data` are the profile's."""
    template = resources.files("bigtrain.profiling").joinpath("time_page.html").read_text(encoding="utf-8")
    bars = [*pair_cells(_pairs(profile)), ""]
    rows = [
        (escape(name), bar, *map(escape, others)) for bar, (name, *others) in zip(bars, profile.cells(), strict=True)
    ]
    return fill(
        template,
        name=escape(profile.name),
        subtitle=escape(_subtitle(profile)),
        figures="\n".join(_figures(profile)),
        classes=html_table(rows, HEADER),
        notes="".join(f"<p>{escape(note)}</p>\n" for note in (profile.sentence(), *profile.notes())),
        details=details("Recipe, as planned", profile.recipe),
        data=json_in_html(profile.as_object()),
    )


def picture(profile: TimeProfile, path: Path) -> None:
    """Write the profile as PNG. Raises InputError for a path that cannot be written."""
    pairs = _pairs(profile)
    drawn = plot.new_figure(11, 1.7 + 0.46 * len(pairs))
    title = f"{profile.name}: {_headline(profile)}\n{_subtitle(profile)}"
    drawn.suptitle(title, x=0.01, ha="left", fontsize=11, color=LIGHT["text"])
    plot_pairs(drawn.add_subplot(), pairs, "Time of a step, in ms", "measured above, predicted below, paler")
    drawn.supxlabel(profile.sentence(), x=0.01, ha="left", fontsize=9, color=LIGHT["text"])
    plot.save(drawn, path)


def _pairs(profile: TimeProfile) -> list[Pair]:
    cells = list(profile.cells())
    return [
        Pair(words(row.name), row.measured, row.predicted, f"{cell[1]}, {cell[2]}", cell[3])
        for row, cell in zip(profile.rows(), cells, strict=False)
    ]


def _headline(profile: TimeProfile) -> str:
    measured, predicted = short_seconds(profile.median_seconds), short_seconds(profile.predicted_seconds)
    return f"a step takes {measured}, predicted {predicted}"


def _subtitle(profile: TimeProfile) -> str:
    versions = ", ".join(f"{name} {version}" for name, version in profile.versions.items())
    return "; ".join(filter(None, (profile.device, f"rates: {profile.rates}", versions)))


def _figures(profile: TimeProfile) -> Iterator[str]:
    median, predicted, profiled = profile.median_seconds, profile.predicted_seconds, profile.measured.seconds
    count = len(profile.step_seconds)
    yield figure("Measured", median, short_seconds(median), f"a step, median of {count} without the profiler")
    yield figure("Predicted", predicted, short_seconds(predicted), f"by the roofline; rates: {profile.rates}")
    gap = median - predicted
    text = f"{'+' if gap >= 0 else '-'}{short_seconds(abs(gap))}"
    yield figure("Gap", gap, text, f"{predicted / median:.0%} of the roofline")
    yield figure("Under the profiler", profiled, short_seconds(profiled), f"the mean of {profile.measured.steps} steps")
