"""The same recipe on more and more ranks: what is chosen at each world size, and how speed grows. No torch."""

from __future__ import annotations

import re
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import TYPE_CHECKING

from bigtrain.charts import palette, plot
from bigtrain.charts.axis import short_seconds
from bigtrain.config.schema import Recipe
from bigtrain.errors import DoesNotFit, Fault, InputError, RecipeError
from bigtrain.models.shape import flops_per_token
from bigtrain.planner.choice import Choice
from bigtrain.planner.hardware import Hardware
from bigtrain.planner.links import Transfer
from bigtrain.planner.offers import Offers
from bigtrain.planner.ranking import closest, device_bytes, fastest
from bigtrain.planner.search import check, check_host
from bigtrain.planner.settle import labelled_fraction, settled
from bigtrain.planner.speed import StepSeconds
from bigtrain.planner.words import bar, short_choice
from bigtrain.units import format_bytes

if TYPE_CHECKING:
    from matplotlib.axes import Axes

MOST_RANKS = 2**20
BAR_WIDTH = 16

COLOURS = ("main", "second", "cause-4", "cause-6")
"""Of the palette, one for each curve of a picture, again from the first after the last."""


@dataclass(frozen=True)
class Scale:
    """The fastest choice at one world size, or why there is none.

    `efficiency` is the tokens per second of a rank against those at the smallest world size that fits.
    """

    world_size: int
    reason: str = ""
    choice: Choice | None = None
    device_bytes: int = 0
    seconds: StepSeconds | None = None
    tokens_per_second: float = 0.0
    mfu: float = 0.0
    efficiency: float = 0.0
    transfers: tuple[Transfer, ...] = ()

    @property
    def rank_tokens_per_second(self) -> float:
        """Return the tokens per second of a rank."""
        return self.tokens_per_second / self.world_size

    @property
    def sending_seconds(self) -> float:
        """Return what a step's collectives take, hidden or not."""
        return sum(sent.seconds for sent in self.transfers)

    @property
    def exposed_share(self) -> float:
        """Return the share of a step in which a rank only waits for others."""
        return 0.0 if self.seconds is None else self.seconds.communication_seconds / self.seconds.total

    def as_object(self) -> dict[str, object]:
        """Return what `bigtrain plan --world-size 8..64 --json` prints."""
        if self.choice is None or self.seconds is None:
            return {"world_size": self.world_size, "choice": None, "reason": self.reason}
        return {
            "world_size": self.world_size,
            "choice": self.choice.as_object(),
            "device_bytes_peak": self.device_bytes,
            "seconds_per_step": self.seconds.total,
            "tokens_per_second": self.tokens_per_second,
            "tokens_per_second_per_rank": self.rank_tokens_per_second,
            "mfu": self.mfu,
            "efficiency": self.efficiency,
            "communication": {
                "seconds": self.sending_seconds,
                "exposed_seconds": self.seconds.communication_seconds,
                "collectives": [sent.as_object() for sent in self.transfers],
            },
        }


def world_sizes(text: str) -> int | list[int]:
    """Return the number of ranks that a text names, or for `8..64` the first and its doublings up to the second.

    Raises InputError for anything else.
    """
    match = re.fullmatch(r"([0-9]{1,9})(?:\.\.([0-9]{1,9}))?", text.strip())
    first, last = (int(match[1]), int(match[2] or match[1])) if match else (0, 0)
    if not 0 < first <= last <= MOST_RANKS:
        what = f"{text[:40]!r} is no number of ranks from 1 to {MOST_RANKS:,}"
        raise InputError(Fault("command line", "--world-size", f"{what}; write 64, or for each doubling 8..1024"))
    if match is None or match[2] is None:
        return first
    return [first << place for place in range((last // first).bit_length())]


def scale(recipe: Recipe, hardware: Hardware | None, sizes: Sequence[int]) -> list[Scale]:
    """Return the fastest choice at each world size, the global batch as the recipe has it.

    A size that does not fit, or whose ranks cannot share the batch, says so. Raises RecipeError if all are wrong.
    """
    found: list[Scale] = []
    faults: list[RecipeError] = []
    for size in sizes:
        try:
            found.append(_at(recipe, hardware, size))
        except RecipeError as error:
            faults.append(error)
            rows = recipe.train.global_batch_size
            too_few = f"{rows:,} rows for {size:,} ranks are less than one for each"
            found.append(Scale(size, too_few if rows < size else "; ".join(str(error).splitlines())))
    if len(faults) == len(found):
        raise faults[0]
    first = next((one.rank_tokens_per_second for one in found if one.choice is not None), 0.0)
    return [_compared(one, first) for one in found]


def _compared(one: Scale, rank_tokens_per_second: float) -> Scale:
    if one.choice is None:
        return one
    return replace(one, efficiency=one.rank_tokens_per_second / rank_tokens_per_second)


def _at(recipe: Recipe, hardware: Hardware | None, world_size: int) -> Scale:
    recipe, model, hardware, ranks = settled(recipe, hardware, world_size)
    check(recipe, hardware, ranks)
    offers = Offers(recipe, model, hardware, ranks)
    best = fastest(offers)
    if best is None:
        over = device_bytes(offers.report(closest(offers))) - offers.budget_bytes
        return Scale(ranks, f"{format_bytes(over)} over the budget at least")
    try:
        check_host(recipe, hardware, best)
    except DoesNotFit as error:
        return Scale(ranks, str(error))
    seconds = offers.seconds(best.choice)
    flops = flops_per_token(model, recipe.data.sequence_length, labelled_fraction(recipe))
    return Scale(
        ranks,
        choice=best.choice,
        device_bytes=device_bytes(best.memory),
        seconds=seconds,
        tokens_per_second=offers.speed.tokens_per_second(seconds),
        mfu=offers.speed.mfu(seconds, flops),
        transfers=tuple(offers.speed.transfers(best.choice)) if ranks > 1 else (),
    )


def scaling_lines(found: Sequence[Scale]) -> Iterator[str]:
    """Yield a table, a line for each world size: speed, efficiency, memory of a rank, what is sent, the choice."""
    columns = f"{'tokens/s':>13}  {'of a rank':>9}  {'efficiency':{6 + BAR_WIDTH}}  {'MFU':>5}  {'memory':>10}"
    yield f"{'ranks':>7}  {columns}  {'sending':>8}  {'exposed':>7}  choice"
    for one in found:
        if one.choice is None:
            yield f"{one.world_size:>7,}  {one.reason}"
            continue
        efficiency = f"{one.efficiency:>4.0%}  {bar(one.efficiency, BAR_WIDTH):{BAR_WIDTH}}"
        rates = f"{one.tokens_per_second:>13,.0f}  {one.rank_tokens_per_second:>9,.0f}  {efficiency}  {one.mfu:>5.1%}"
        sent = f"{short_seconds(one.sending_seconds):>8}  {one.exposed_share:>7.1%}"
        memory = f"{format_bytes(one.device_bytes):>10}"
        yield f"{one.world_size:>7,}  {rates}  {memory}  {sent}  {short_choice(one.choice)}"
    yield "predicted; efficiency: tokens/s of a rank against the first line; exposed: share of a step spent waiting"


def scaling_picture(curves: Mapping[str, Sequence[Scale]], path: Path, *, title: str = "") -> None:
    """Write curves as PNG, by their names: efficiency, and the share of a step that is exposed sending.

    Raises InputError for a path that cannot be written.
    """
    drawn = plot.new_figure(11, 4.2)
    left, right = drawn.subplots(1, 2)
    plot.tidy(left, f"Efficiency{title and ': '}{title}", note="predicted")
    plot.tidy(right, "Share of a step spent waiting for other ranks", note="predicted")
    fitting = {name: [one for one in found if one.choice is not None] for name, found in curves.items()}
    most = max((one.exposed_share for found in fitting.values() for one in found), default=0.0)
    _draw(left, {name: [(one.world_size, one.efficiency) for one in found] for name, found in fitting.items()}, 1.1)
    exposed = {name: [(one.world_size, one.exposed_share) for one in found] for name, found in fitting.items()}
    _draw(right, exposed, max(0.1, 1.15 * most))
    left.legend(frameon=False, fontsize=8.5, loc="lower left")
    plot.save(drawn, path)


def _draw(axes: Axes, curves: Mapping[str, Sequence[tuple[int, float]]], high: float) -> None:
    plot.ticks(axes, "y", high, "share")
    axes.set_xscale("log", base=2)
    sizes = sorted({size for points in curves.values() for size, _ in points})
    axes.set_xticks(sizes, [f"{size:,}" for size in sizes], rotation=45)
    axes.minorticks_off()
    axes.set_xlabel("ranks", fontsize=8.5, color=palette.LIGHT["quiet"])
    for place, (name, points) in enumerate(curves.items()):
        colour = palette.LIGHT[COLOURS[place % len(COLOURS)]]
        axes.plot(*zip(*points, strict=True), "o-", color=colour, markersize=4, linewidth=1.6, label=name)
