"""Which of the choices that fit is the best, and which holds the least. No torch.

Choices are compared by the predicted seconds of a step, and fit by their allocated peak, composed from parts. What the
best one takes of the device is then found exactly; if that is over the budget, the limit on allocated bytes is lowered
by what lies between the two, and the search goes on.
"""

from __future__ import annotations

from bisect import bisect_right
from collections.abc import Iterable, Sequence
from dataclasses import dataclass, field, replace
from math import inf
from typing import NamedTuple

from bigtrain.config.schema import Recipe
from bigtrain.memory.compose import Runs
from bigtrain.memory.report import MemoryReport
from bigtrain.optim.cost import MASTER_WEIGHTS, STATES
from bigtrain.planner.candidates import OFFLOADS, mixes, settings
from bigtrain.planner.choice import Choice
from bigtrain.planner.hardware import Hardware
from bigtrain.planner.offers import Offer, Offers
from bigtrain.planner.price import beside_bytes

ALIKE = 0.01
"""Steps that are longer than the fastest by no more than this share of it count as fast: predictions are no sharper."""

LESSONS = 6
"""Choices that may turn out to be over the budget before what the last one's allocator adds is taken for everyone's."""


@dataclass
class Limits:
    """The allocated bytes that fit: `common` for all, less for settings whose allocator was found to add more.

    What an allocator adds follows from the passes over the blocks, whatever the number of groups that hold a model.
    """

    budget_bytes: int
    common: int
    own: dict[Choice, int] = field(default_factory=dict)
    lessons: int = 0

    def of(self, setting: Choice) -> int:
        """Return the limit of a setting."""
        return min(self.common, self.own.get(replace(setting, replicate=1), self.common))

    def learn(self, offer: Offer, report: MemoryReport) -> None:
        """Take in the whole memory of an offer that was within the limit and is over the budget.

        What lies beside the allocator is the same for all choices; what the allocator adds is not, and counts for all
        only after several lessons.
        """
        device, reserved = device_bytes(report), report.reserved_bytes_peak
        assert reserved is not None
        self.common = min(self.common, self.budget_bytes - (device - reserved))
        limit = min(offer.allocated_bytes - 1, self.budget_bytes - (device - offer.allocated_bytes))
        self.own[replace(offer.choice, recompute=(), replicate=1)] = limit
        self.lessons += 1
        if self.lessons >= LESSONS:
            self.common = min(self.common, limit)


class Best(NamedTuple):
    """The best choice with its memory, and the allocated bytes that others may hold."""

    choice: Choice
    memory: MemoryReport
    limits: Limits


def fastest(offers: Offers) -> Best | None:
    """Return the best choice that fits, or None.

    Where the best computes something again, so may one be faster whose blocks' inputs go to the host meanwhile. Limits
    are learned from some choices and may leave out all others, so the one that holds the least is tried at last.
    """
    space = settings(offers.recipe, offers.hardware, offers.world_size)
    best: Best | None = None
    for rows in mix_spaces(offers.recipe, offers.model.num_hidden_layers, offers.hardware):
        found = _confirmed(offers, space, rows)
        if found is not None and (best is None or _seconds(offers, found) < _seconds(offers, best) * (1 - ALIKE)):
            best = found
        if best is not None and set(best.choice.recompute) == {"none"}:
            break
    return best or last_resort(offers)


def _seconds(offers: Offers, best: Best) -> float:
    return offers.seconds(best.choice).total


def last_resort(offers: Offers) -> Best | None:
    """Return the choice that holds the least, if it fits: its tensors tell in most cases that it does not."""
    choice = closest(offers)
    least = offers.of(choice).allocated_bytes + beside_bytes(offers.hardware, offers.world_size)
    if least > offers.budget_bytes or device_bytes(report := offers.report(choice)) > offers.budget_bytes:
        return None
    return Best(choice, report, Limits(offers.budget_bytes, offers.of(choice).allocated_bytes))


def closest(offers: Offers) -> Choice:
    """Return the choice with the smallest allocated peak."""
    space = [line[0] for line in _lines(settings(offers.recipe, offers.hardware, offers.world_size))]
    best: tuple[int, Choice] | None = None
    for rows in mix_spaces(offers.recipe, offers.model.num_hidden_layers, offers.hardware):
        for setting in space:
            if best is None or (offers.state_bytes(setting) < best[0] and offers.floor_bytes(setting, rows) < best[0]):
                held = offers.least_bytes(setting, rows)
                best = held if best is None or held[0] < best[0] else best
    assert best is not None
    return best[1]


def mix_spaces(recipe: Recipe, blocks: int, hardware: Hardware) -> list[list[list[Runs]]]:
    """Return the mixes of policies that are tried first, and those with blocks' inputs on the host."""
    more = hardware.kind == "cuda" and recipe.recompute.policy == "auto"
    return [mixes(recipe, blocks, hardware, offload=offload) for offload in ((False, True) if more else (False,))]


def device_bytes(report: MemoryReport) -> int:
    """Return what the memory budget bounds."""
    assert report.device_bytes_peak is not None
    return report.device_bytes_peak


def _confirmed(offers: Offers, space: Sequence[Choice], rows: Sequence[Sequence[Runs]]) -> Best | None:
    """Return the best that fits when a whole step is run, lowering limits as often as it does not."""
    beside = beside_bytes(offers.hardware, offers.world_size)
    limits = Limits(offers.budget_bytes, offers.budget_bytes - beside)
    while (best := _best(offers, space, rows, limits)) is not None:
        report = offers.report(best.choice)
        if device_bytes(report) <= limits.budget_bytes:
            return Best(best.choice, report, limits)
        limits.learn(best, report)
    return None


def _best(offers: Offers, space: Sequence[Choice], rows: Sequence[Sequence[Runs]], limits: Limits) -> Offer | None:
    """Return the offer that is preferred among the fastest that fit."""
    lines = {setting: line for line in _lines(space) for setting in line}
    small: dict[int, set[Choice]] = {}
    fit: list[Offer] = []
    least = inf
    for setting in sorted(space, key=lambda setting: offers.least_seconds(setting, rows)):
        if offers.least_seconds(setting, rows) > least * (1 + ALIKE):
            break
        line = lines[setting]
        if id(line) not in small:
            small[id(line)] = set(_small_enough(offers, line, rows, limits.common))
        if setting in small[id(line)]:
            fit += offers.fitting(setting, rows, limits.of(setting), least * (1 + ALIKE))
            least = min((offer.seconds for offer in fit), default=inf)
    return min((offer for offer in fit if offer.seconds <= least * (1 + ALIKE)), key=_preference, default=None)


def _lines(space: Iterable[Choice]) -> list[list[Choice]]:
    """Return settings that differ in nothing but the size of the micro-batch together, the smallest first.

    Whether there are several micro-batches, so that gradients are there before the last, is a difference too.
    """
    lines: dict[Choice, list[Choice]] = {}
    for setting in space:
        several = 2 if setting.accumulation_steps > 1 else 1
        lines.setdefault(replace(setting, micro_batch_size=0, accumulation_steps=several), []).append(setting)
    return [sorted(line, key=lambda setting: setting.micro_batch_size) for line in lines.values()]


def _small_enough(
    offers: Offers, line: Sequence[Choice], rows: Sequence[Sequence[Runs]], limit_bytes: int
) -> Sequence[Choice]:
    """Return the settings of a line without large micro-batches that cannot fit.

    What a step holds grows with the micro-batch at each moment, so that none fits that is larger than one that cannot.
    """
    if offers.state_bytes(line[0]) > limit_bytes:
        return ()
    place = bisect_right(line, limit_bytes, key=lambda setting: offers.floor_bytes(setting, rows))
    return line[:place]


def _preference(offer: Offer) -> tuple[object, ...]:
    """Return what orders choices that are as fast: the exact first, then the simple, then the small."""
    choice = offer.choice
    return (
        STATES.index(choice.optimizer_state),
        MASTER_WEIGHTS.index(choice.master_weights),
        OFFLOADS.index(choice.offload) if choice.offload in OFFLOADS else len(OFFLOADS),
        len(choice.recompute) - choice.recompute.count("none"),
        choice.zero_stage,
        choice.accumulation_steps,
        offer.allocated_bytes,
        not choice.gradient_release,
    )
