"""Why the neighbours of the best choice lost, in words. No torch."""

from __future__ import annotations

import dataclasses
from collections.abc import Iterator, Sequence
from dataclasses import dataclass

from bigtrain.optim.cost import MASTER_WEIGHTS, STATES
from bigtrain.planner.candidates import mixes, settings
from bigtrain.planner.choice import Choice
from bigtrain.planner.offers import Offer, Offers
from bigtrain.planner.ranking import ALIKE, Best
from bigtrain.units import format_bytes

AXES = (
    ("micro_batch_size", "accumulation_steps"),
    ("replicate",),
    ("offload",),
    ("optimizer_state",),
    ("gradient_release",),
    ("master_weights",),
)
"""Fields of a choice that change together."""


@dataclass(frozen=True)
class Rejected:
    """What another choice has different, by the names in `Choice`, and why it lost."""

    different: dict[str, object]
    reason: str

    def as_object(self) -> dict[str, object]:
        """Return what `bigtrain plan --json` prints."""
        return {"choice": self.different, "reason": self.reason}


def rejected(offers: Offers, best: Best) -> tuple[Rejected, ...]:
    """Return what is next to the best choice, for each key that the recipe leaves open, and why it lost."""
    won = offers.of(best.choice)
    others = dict.fromkeys(choice for choice in _neighbours(offers, best.choice) if choice != best.choice)
    added = (best.memory.reserved_bytes_peak or 0) - best.memory.allocated_bytes_peak
    return tuple(
        Rejected(
            different(choice, best.choice),
            _reason(offers.of(choice), won, best.limits.of(dataclasses.replace(choice, recompute=())), added),
        )
        for choice in others
    )


def _neighbours(offers: Offers, choice: Choice) -> Iterator[Choice]:
    """Yield choices that differ in one respect: a step up or down, or one policy for all blocks."""
    here = dataclasses.replace(choice, recompute=())
    space = settings(offers.recipe, offers.hardware, offers.world_size)
    for setting in (*_steps(space, here), *_stages(space, here)):
        yield dataclasses.replace(setting, recompute=choice.recompute)
    for policy in _uniform(offers):
        yield dataclasses.replace(choice, recompute=(policy,) * len(choice.recompute))


def _steps(space: Sequence[Choice], here: Choice) -> Iterator[Choice]:
    for axis in AXES:
        line = [setting for setting in space if _same(setting, here, but=axis)]
        place = line.index(here)
        yield from line[max(0, place - 1) : place + 2]


def _stages(space: Sequence[Choice], here: Choice) -> Iterator[Choice]:
    """Yield the stages above and below, with as many groups if they can have those."""
    for stage in (here.zero_stage - 1, here.zero_stage + 1):
        line = [
            setting
            for setting in space
            if setting.zero_stage == stage and _same(setting, here, but=("zero_stage", "replicate"))
        ]
        yield from sorted(line, key=lambda setting: abs(setting.replicate - here.replicate))[:1]


def _uniform(offers: Offers) -> Iterator[str]:
    rows = mixes(offers.recipe, offers.model.num_hidden_layers, offers.hardware)
    yield from dict.fromkeys(mix[0][0] for row in rows for mix in row if len(mix) == 1)


def _same(setting: Choice, other: Choice, *, but: Sequence[str]) -> bool:
    return dataclasses.replace(setting, **{name: getattr(other, name) for name in but}) == other


def different(choice: Choice, won: Choice) -> dict[str, object]:
    """Return what a choice has that the winner has not, but for what follows from its micro-batch."""
    mine, other = choice.as_object(), won.as_object()
    del mine["accumulation_steps"]
    return {name: value for name, value in mine.items() if value != other[name]}


def _reason(offer: Offer, won: Offer, limit_bytes: int, added_bytes: int) -> str:
    """Say why an offer lost; where it does not fit, its allocator is taken to add as much as the best one's."""
    over, slower = offer.allocated_bytes - limit_bytes, offer.seconds / won.seconds - 1
    if over > 0:
        return f"{format_bytes(over + added_bytes)} over the budget"
    if slower > ALIKE:
        return f"{slower:.0%} slower"
    return f"as fast, {_drawback(offer, won)}"


def _drawback(offer: Offer, won: Offer) -> str:
    choice, other = offer.choice, won.choice
    if _coarseness(choice) > _coarseness(other):
        return "and less exact"
    if choice.recompute.count("none") < other.recompute.count("none"):
        return "and computes more again"
    more = offer.allocated_bytes - won.allocated_bytes
    return f"and takes {format_bytes(more)} more" if more > 0 else "and has more moving parts"


def _coarseness(choice: Choice) -> tuple[int, int]:
    """Return how far numbers are from those of fp32 states and weights."""
    return STATES.index(choice.optimizer_state), MASTER_WEIGHTS.index(choice.master_weights)
