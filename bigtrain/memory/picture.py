"""A profile as a page that needs no network, and as a picture: predicted beside measured, by cause, part and time."""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from html import escape
from importlib import resources
from pathlib import Path
from typing import TYPE_CHECKING

from bigtrain.charts import palette, plot
from bigtrain.charts.axis import short_seconds
from bigtrain.charts.elements import details, figure, fill, html_table, json_in_html, legend, words
from bigtrain.charts.stacked import HEADROOM, Stack, draw_stack, stack_data
from bigtrain.memory.profiled import (
    SIDES,
    STACKED,
    BlockObject,
    ChangeObject,
    ProfileObject,
    TimelineObject,
    bands,
    peak_place,
    thin_timeline,
    totals,
)
from bigtrain.memory.report import CAUSES
from bigtrain.units import format_bytes

if TYPE_CHECKING:
    from matplotlib.axes import Axes

MOST_NAMES = 40
"""Parts of the model that are named in a picture; of more, every second, third, ... has its name."""

LEAST_ERROR = 1e-5
"""Of the measured peak; smaller errors are not told in figures."""

PAIR = ((-0.2, 1.0), (0.2, 0.5))
"""Where predicted and measured bars stand beside their place, and how strong their colours are."""


def page(profile: ProfileObject) -> str:
    """Return the profile as one page; the numbers in its element `data` are the profile's, with thinned timelines."""
    sides = {side: thin_timeline(timeline) for side, timeline in profile["timeline"].items()}
    stacks = list(_stacks(sides))
    template = resources.files("bigtrain.memory").joinpath("picture_page.html").read_text(encoding="utf-8")
    return fill(
        template,
        name=escape(profile["name"]),
        subtitle=escape(_subtitle(profile)),
        figures="\n".join(_figures(profile)),
        timelines="\n".join(map(_timeline, stacks)),
        causes=_causes(profile),
        blocks=_blocks(profile["blocks"]),
        changes=_changes(profile["changes"]),
        details=details("Recipe, as planned", profile["recipe"]),
        data=json_in_html({**profile, "timeline": sides}),
        charts=json_in_html({"causes": STACKED[::-1], "stacks": {stack.key: stack_data(stack) for stack in stacks}}),
    )


def picture(profile: ProfileObject, path: Path) -> None:
    """Write the profile as PNG. Raises InputError for a path that cannot be written."""
    sides = {side: thin_timeline(timeline) for side, timeline in profile["timeline"].items()}
    heights = [*([2.7] * len(sides)), 3.4]
    drawn = plot.new_figure(13, 0.6 + sum(heights))
    grid = drawn.add_gridspec(len(heights), 2, height_ratios=heights, width_ratios=(2, 3))
    drawn.suptitle(_headline(profile), x=0.01, ha="left", fontsize=11, color=palette.LIGHT["text"])
    high = HEADROOM * max((max(totals(timeline)) for timeline in sides.values()), default=0) or 1.0
    for row, side in enumerate(filter(sides.__contains__, SIDES)):
        _plot_timeline(drawn.add_subplot(grid[row, :]), side, sides[side], high)
    _plot_causes(drawn.add_subplot(grid[-1, 0]), profile)
    _plot_blocks(drawn.add_subplot(grid[-1, 1]), profile["blocks"])
    plot.save(drawn, path)


def _by_cause(profile: ProfileObject, cause: str) -> tuple[int, int]:
    return profile["predicted"]["by_cause"].get(cause, 0), profile["measured"]["by_cause"].get(cause, 0)


def _style(cause: str) -> str:
    return f"cause-{CAUSES.index(cause)}"


def _signed(size: int) -> str:
    return f"{'+' if size > 0 else '-' if size < 0 else ''}{format_bytes(abs(size))}"


def _error(error: float) -> str:
    if 0 < abs(error) < LEAST_ERROR:
        return f"less than {LEAST_ERROR:.3%}"
    return f"{error:+.3%}" if error else "0%"


def _subtitle(profile: ProfileObject) -> str:
    versions = ", ".join(f"{name} {version}" for name, version in profile["versions"].items())
    return "; ".join(filter(None, (profile["device"], versions)))


def _headline(profile: ProfileObject) -> str:
    predicted, measured = (format_bytes(profile[side]["allocated_bytes_peak"]) for side in ("predicted", "measured"))
    return (
        f"{profile['name']}: predicted {predicted}, measured {measured} (off by {_error(profile['relative_error'])})\n"
        f"{_subtitle(profile)}"
    )


def _figures(profile: ProfileObject) -> Iterator[str]:
    predicted, measured = profile["predicted"], profile["measured"]
    for side, memory, note in (("Predicted", predicted, "before it ran"), ("Measured", measured, "in real steps")):
        size = memory["allocated_bytes_peak"]
        yield figure(f"{side} peak", size, format_bytes(size), f"allocated, {note}")
    over = predicted["allocated_bytes_peak"] - measured["allocated_bytes_peak"]
    error = profile["relative_error"]
    compared = f"{format_bytes(abs(over))} {'more' if over > 0 else 'less'} than measured" if over else "to the byte"
    yield figure("Prediction off by", error, _error(error), compared)
    if (device := measured["device_bytes_peak"]) is not None:
        planned = predicted["device_bytes_peak"]
        foreseen = "" if planned is None else f"; predicted {format_bytes(planned)}"
        yield figure("Held in all", device, format_bytes(device), f"with what is not a tensor{foreseen}")
    if (seconds := profile.get("measured_step_seconds")) is not None:
        expected = profile.get("predicted_step_seconds")
        foreseen = "" if expected is None else f"; predicted {short_seconds(expected)}"
        yield figure("Time of a step", seconds, short_seconds(seconds), f"measured{foreseen}")


def _stacks(sides: Mapping[str, TimelineObject]) -> Iterator[Stack]:
    """Yield the timelines as charts on one vertical scale."""
    high = max((max(totals(timeline)) for timeline in sides.values()), default=0)
    for side in filter(sides.__contains__, SIDES):
        timeline = sides[side]
        layers = {_style(cause): timeline["causes"][cause] for cause in STACKED if cause in timeline["causes"]}
        yield Stack(side, timeline["time"], layers, bands(timeline), high, _peak(timeline))


def _peak(timeline: TimelineObject) -> str:
    most, place = max(totals(timeline)), peak_place(timeline)[1]
    return ", ".join(filter(None, (f"peak {format_bytes(most)}", place)))


def _timeline(stack: Stack) -> str:
    causes = {_style(cause): words(cause) for cause in STACKED}
    entries = legend((style, causes[style]) for style, sizes in stack.layers.items() if any(sizes))
    title = f'<h2 id="{stack.key}-title">One step, {stack.key}</h2>'
    note = "<div>along its allocations and releases; the pointer shows what is alive</div>"
    return (
        f'<figure class="wide" id="{stack.key}"><figcaption>{title}{entries}{note}</figcaption>'
        f'<div class="plot">{draw_stack(stack)}</div></figure>'
    )


def _causes(profile: ProfileObject) -> str:
    rows = [
        (f'<i class="{_style(cause)}"></i>{words(cause)}', _style(cause), *_by_cause(profile, cause))
        for cause in STACKED
        if any(_by_cause(profile, cause))
    ]
    return _compared("held for", rows)


def _blocks(blocks: Sequence[BlockObject]) -> str:
    rows = [(escape(one["name"]), "main", one["predicted_bytes"], one["measured_bytes"]) for one in blocks]
    return _compared("part", rows)


def _compared(what: str, rows: Sequence[tuple[str, str, int, int]]) -> str:
    """Return a table of sizes, predicted beside measured; of each row: name as HTML, CSS class, the two sizes."""
    most = max((max(row[2:]) for row in rows), default=0) or 1
    cells = [
        (name, _bars(style, (predicted / most, measured / most)), *map(format_bytes, (predicted, measured)), difference)
        for name, style, predicted, measured in rows
        for difference in (_signed(predicted - measured),)
    ]
    return html_table(cells, (what, "", "predicted", "measured", "difference"))


def _bars(style: str, shares: tuple[float, float]) -> str:
    return "".join(f'<b class="bar {style}" style="width:{max(0.0, share):.2%}"></b>' for share in shares)


def _changes(changes: Sequence[ChangeObject]) -> str:
    if not changes:
        return "<p>No change of the recipe is predicted to need less memory.</p>"
    rows = []
    for one in changes:
        speed = "not predicted" if one["tokens_per_second"] is None else f"{one['tokens_per_second']:+.1%}"
        rows.append((f"<code>{escape(one['change'])}</code>", _signed(one["bytes"]), speed))
    return html_table(rows, ("change", "memory", "tokens per second"))


def _plot_timeline(axes: Axes, side: str, timeline: TimelineObject, high: float) -> None:
    plot.tidy(axes, f"One step, {side}")
    plot.ticks(axes, "y", high, "bytes")
    plot.ticks(axes, "x", 1.0, "share", 10)
    causes = [cause for cause in STACKED if any(timeline["causes"].get(cause, ()))]
    axes.stackplot(
        timeline["time"],
        [timeline["causes"][cause] for cause in causes],
        colors=[palette.LIGHT[_style(cause)] for cause in causes],
        labels=list(map(words, causes)),
        step="post",
        linewidth=0,
    )
    for begin, phase in bands(timeline):
        axes.axvline(begin, color=palette.LIGHT["quiet"], linewidth=0.8, alpha=0.4)
        axes.annotate(
            phase, (begin, high), (3, 2), textcoords="offset points", fontsize=8, color=palette.LIGHT["quiet"]
        )
    time, most = peak_place(timeline)[0], max(totals(timeline))
    axes.plot([time], [most], "o", markersize=4, color=palette.LIGHT["bad"])
    on_the_right = time < 0.8
    axes.annotate(
        _peak(timeline),
        (time, most),
        (-3 if on_the_right else 3, 6),
        textcoords="offset points",
        ha="left" if on_the_right else "right",
        fontsize=8.5,
        color=palette.LIGHT["text"],
        bbox={"boxstyle": "square,pad=0.1", "facecolor": palette.LIGHT["card"], "edgecolor": "none"},
    )
    axes.legend(loc="lower right", bbox_to_anchor=(1.0, 1.05), ncols=len(CAUSES), fontsize=8.5, frameon=False)


def _plot_causes(axes: Axes, profile: ProfileObject) -> None:
    causes = [cause for cause in STACKED if any(_by_cause(profile, cause))]
    plot.tidy(axes, "At the peak, by cause", grid="x", note="predicted above, measured below, paler")
    plot.ticks(axes, "x", 1.3 * max((max(_by_cause(profile, cause)) for cause in causes), default=0) or 1.0, "bytes", 4)
    axes.set(yticks=range(len(causes)), yticklabels=list(map(words, causes)), ylim=(len(causes) - 0.4, -0.6))
    for row, cause in enumerate(causes):
        for size, (offset, strength) in zip(_by_cause(profile, cause), PAIR, strict=True):
            axes.barh(row + offset, size, height=0.36, color=palette.LIGHT[_style(cause)], alpha=strength)
            place = (size, row + offset), (4, 0)
            axes.annotate(format_bytes(size), *place, textcoords="offset points", va="center", fontsize=7)


def _plot_blocks(axes: Axes, blocks: Sequence[BlockObject]) -> None:
    plot.tidy(axes, "At the peak, by part of the model", note="predicted left, measured right, paler")
    sizes = [(one["predicted_bytes"], one["measured_bytes"]) for one in blocks]
    plot.ticks(axes, "y", 1.1 * max((max(pair) for pair in sizes), default=0) or 1.0, "bytes")
    for side, (offset, strength) in enumerate(PAIR):
        places, heights = [place + offset for place in range(len(blocks))], [pair[side] for pair in sizes]
        axes.bar(places, heights, width=0.36, color=palette.LIGHT["main"], alpha=strength)
    named = range(0, len(blocks), 1 + len(blocks) // MOST_NAMES)
    axes.set(xticks=named, xticklabels=[blocks[place]["name"] for place in named], xlim=(-0.8, len(blocks) - 0.2))
    axes.tick_params(axis="x", rotation=90 if len(blocks) > 8 else 0, length=0)
