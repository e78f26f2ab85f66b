"""The fastest way to train any model within a budget, from traces of its parts. No torch: traces are plain numbers.

A trace of a few sizes of micro-batch gives any size and any mix of recompute policies. What the best choice holds is
then found exactly; if that is over the budget, the limit is lowered by as much as lies between the two.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from math import inf

from bigtrain.errors import DoesNotFit
from bigtrain.memory.blockwise import RECOMPUTE, ModelTrace, between
from bigtrain.memory.profiled import ChangeObject
from bigtrain.memory.report import MemoryReport
from bigtrain.planner.candidates import divisors
from bigtrain.planner.choice import Choice
from bigtrain.planner.hardware import Hardware
from bigtrain.planner.price import beside_bytes, on_device
from bigtrain.planner.ranking import ALIKE, device_bytes
from bigtrain.planner.refusal import rounded_up
from bigtrain.planner.rejection import Rejected, different
from bigtrain.planner.speed import StepSeconds
from bigtrain.units import format_bytes

TRACED_ROWS = (2, 4)
"""Sizes of micro-batch that are traced; of one row alone torch lays some tensors out in another way."""

STAGES = (0, 1, 2, 3)


@dataclass(frozen=True)
class Module:
    """A model to be searched: rows a rank and step, blocks that may recompute, and what tells its prices.

    `trace` gives the parts of a micro-batch of so many rows, `exact` the memory of a choice on one rank; both are slow.
    Weights, states and gradients are of one rank alone; an update holds `update_bytes` in all. `sending` gives the
    exposed seconds of a choice's collectives, beside a forward and a backward pass of so many. `micro_batch_size`,
    `recompute` and `zero_stage` are not searched where they are given.
    """

    rows: int
    blocks: int
    world_size: int
    weight_bytes: int
    state_bytes: int
    gradient_bytes: int
    update_bytes: int
    update_seconds: float
    hardware: Hardware
    trace: Callable[[int], ModelTrace]
    exact: Callable[[Choice], MemoryReport]
    sending: Callable[[Choice, float, float], float]
    micro_batch_size: int | None = None
    recompute: tuple[str, ...] | None = None
    zero_stage: int | None = None


@dataclass(frozen=True)
class FoundModule:
    """The choice, its prices, why others lost, and what more recomputation would save."""

    choice: Choice
    memory: MemoryReport
    seconds: StepSeconds
    rejected: tuple[Rejected, ...]
    changes: tuple[ChangeObject, ...]


@dataclass(frozen=True)
class _Offer:
    choice: Choice
    seconds: float
    held_bytes: int


def search_module(module: Module, budget_bytes: int, *, name: str) -> FoundModule:
    """Return the fastest choice that fits; of those that are as fast, the simplest.

    Raises DoesNotFit, saying how much is missing with the least that the model can hold.
    """
    prices = Prices(module)
    limit = budget_bytes - beside_bytes(module.hardware, module.world_size)
    while (best := _best(prices, limit)) is not None:
        report = prices.report(best.choice)
        over = device_bytes(report) - budget_bytes
        if over <= 0:
            lost = tuple(_rejected(prices, best, limit))
            return FoundModule(best.choice, report, prices.seconds(best.choice), lost, tuple(_changes(prices, best)))
        limit = min(limit, best.held_bytes) - over
    raise _refused(prices, budget_bytes, name)


class Prices:
    """What choices hold and take, each size of micro-batch found once."""

    def __init__(self, module: Module) -> None:
        self.module = module
        self._traces: dict[int, ModelTrace] = {}

    def trace(self, rows: int) -> ModelTrace:
        """Return the parts at so many rows: traced, or on the line through two sizes that are."""
        if rows not in self._traces:
            few = self.module.rows < max(TRACED_ROWS) or self.module.micro_batch_size is not None
            self._traces[rows] = self.module.trace(rows) if few else self._composed(rows)
        return self._traces[rows]

    def _composed(self, rows: int) -> ModelTrace:
        low, high = TRACED_ROWS
        if rows in TRACED_ROWS:
            return self.module.trace(rows)
        try:
            return between(self.trace(low), self.trace(high), (rows - low) / (high - low))
        except ValueError:  # the sizes run different blocks
            return self.module.trace(rows)

    def held_bytes(self, choice: Choice) -> int:
        """Return the allocated peak of one rank."""
        module, trace = self.module, self.trace(choice.micro_batch_size)
        policies = [choice.recompute[place] for place in trace.places]
        passes = trace.peak_bytes(policies, accumulated=choice.accumulation_steps > 1)
        if choice.accumulation_steps > 1:
            passes += trace.gradient_bytes
        held = max(module.weight_bytes + module.state_bytes + passes, module.update_bytes)
        return held + sum(sharding_bytes(module, trace, choice).values())

    def report(self, choice: Choice) -> MemoryReport:
        """Return all memory of one rank: of a traced step, changed by what sharding does."""
        module, report = self.module, self.module.exact(choice)
        causes = dict(report.by_cause)
        for cause, size in sharding_bytes(module, self.trace(choice.micro_batch_size), choice).items():
            causes[cause] = max(0, causes.get(cause, 0) + size)
        changed = dataclasses.replace(report, by_cause=causes)
        if report.reserved_bytes_peak is not None:
            more = changed.allocated_bytes_peak - report.allocated_bytes_peak
            changed = dataclasses.replace(changed, reserved_bytes_peak=report.reserved_bytes_peak + more)
        return on_device(changed, module.hardware, module.world_size)

    def seconds(self, choice: Choice) -> StepSeconds:
        """Return what a step takes."""
        trace, times = self.trace(choice.micro_batch_size), choice.accumulation_steps
        forward, backward, again = trace.seconds([choice.recompute[place] for place in trace.places])
        shards = self.module.world_size // choice.replicate if choice.zero_stage else 1
        return StepSeconds(
            times * forward,
            times * backward,
            times * again,
            self.module.update_seconds / shards,
            self.module.sending(choice, times * forward, times * (backward + again)),
        )

    def offer(self, choice: Choice) -> _Offer:
        """Return a choice with its prices."""
        return _Offer(choice, self.seconds(choice).total, self.held_bytes(choice))


def sharding_bytes(module: Module, trace: ModelTrace, choice: Choice) -> dict[str, int]:
    """Return by cause the bytes that sharding adds to what one rank alone holds, less than none where it saves.

    As `sharding/README.md` says the stages are built: stages 1 and 2 keep all weights gathered, 3 and 0 those of the
    block that runs and of the next; from stage 2 on gradients are whole for two blocks only. Arithmetic, not a trace.
    """
    if module.world_size == 1:
        return {}
    shards = module.world_size // choice.replicate if choice.zero_stage else 1
    left = 1 - 1 / shards
    block_weights = max(kind.parameter_bytes for kind in trace.kinds)
    block_gradients = max(kind.gradient_bytes for kind in trace.kinds)
    gathered = module.weight_bytes if choice.zero_stage in (1, 2) else 2 * block_weights
    sharded_gradients = choice.zero_stage >= 2
    return {
        "weights": -round(module.weight_bytes * left),
        "optimizer_state": -round(module.state_bytes * left),
        "gradients": -round(module.gradient_bytes * left) if sharded_gradients else 0,
        "communication": gathered + 2 * block_gradients,
    }


def settings(module: Module) -> Iterator[Choice]:
    """Yield every choice without recompute policies: sizes of the micro-batch, stages of ZeRO."""
    for micro in divisors(module.rows) if module.micro_batch_size is None else [module.micro_batch_size]:
        for stage in _stages(module):
            replicate = 1 if stage or module.world_size == 1 else module.world_size
            yield Choice(micro, module.rows // micro, (), stage, replicate)


def _stages(module: Module) -> tuple[int, ...]:
    if module.world_size == 1:
        return (0,)
    return tuple(STAGES) if module.zero_stage is None else (module.zero_stage,)


def mixes(module: Module) -> Iterator[tuple[int, tuple[str, ...]]]:
    """Yield how many blocks compute something again, and a policy for each; those that keep more come last."""
    if module.recompute is not None:
        yield 0, module.recompute
        return
    blocks = module.blocks
    for whole in range(blocks + 1):
        for part in range(blocks + 1 - whole):
            keeping = ("none",) * (blocks - whole - part)
            yield whole + part, ("full",) * whole + ("selective",) * part + keeping


def _fitting(prices: Prices, setting: Choice, limit_bytes: int) -> Iterator[_Offer]:
    """Yield the mixes that fit and may be the fastest: none that computes at least as much again as one that fits."""
    lightest = inf
    for again, policies in mixes(prices.module):
        if again >= lightest:
            continue
        choice = dataclasses.replace(setting, recompute=policies)
        if prices.held_bytes(choice) <= limit_bytes:
            lightest = again
            yield prices.offer(choice)


def _best(prices: Prices, limit_bytes: int) -> _Offer | None:
    """Return the simplest of the fastest that fit."""
    fit: list[_Offer] = []
    least = inf
    plain = ("none",) * prices.module.blocks
    bounds = [(prices.seconds(dataclasses.replace(s, recompute=plain)).total, s) for s in settings(prices.module)]
    for bound, setting in sorted(bounds, key=lambda pair: pair[0]):
        if bound > least * (1 + ALIKE):
            break
        fit += _fitting(prices, setting, limit_bytes)
        least = min((offer.seconds for offer in fit), default=inf)
    alike = [offer for offer in fit if offer.seconds <= least * (1 + ALIKE)]
    return min(alike, key=_preference, default=None)


def _preference(offer: _Offer) -> tuple[int, int, int]:
    choice = offer.choice
    return len(choice.recompute) - choice.recompute.count("none"), choice.zero_stage, offer.held_bytes


def _rejected(prices: Prices, best: _Offer, limit_bytes: int) -> Iterator[Rejected]:
    """Yield why the neighbours lost: other sizes, stages next to it, one policy for all blocks."""
    choice = best.choice
    space = list(settings(prices.module))
    here = space.index(dataclasses.replace(choice, recompute=()))
    sizes = [s for s in space if s.zero_stage == choice.zero_stage]
    place = sizes.index(space[here])
    near = [*sizes[max(0, place - 1) : place], *sizes[place + 1 : place + 2]]
    stages = [
        s for s in space if s.micro_batch_size == choice.micro_batch_size and abs(s.zero_stage - choice.zero_stage) == 1
    ]
    others = [dataclasses.replace(setting, recompute=choice.recompute) for setting in (*near, *stages)]
    others += _uniform(prices.module, choice)
    for other in dict.fromkeys(others):
        if other != choice:
            yield Rejected(different(other, choice), _reason(prices.offer(other), best, limit_bytes))


def _uniform(module: Module, setting: Choice) -> list[Choice]:
    """Return a setting with each policy for all blocks, or with the one that is given."""
    given = [module.recompute] if module.recompute is not None else [(policy,) * module.blocks for policy in RECOMPUTE]
    return [dataclasses.replace(setting, recompute=policies) for policies in given]


def _changes(prices: Prices, best: _Offer) -> Iterator[ChangeObject]:
    """Yield which policies for all blocks would hold less, given or not, and what they cost."""
    for policy in RECOMPUTE:
        other = prices.offer(dataclasses.replace(best.choice, recompute=(policy,) * prices.module.blocks))
        if other.held_bytes < best.held_bytes:
            yield {
                "change": f"recompute={policy}",
                "bytes": other.held_bytes - best.held_bytes,
                "tokens_per_second": best.seconds / other.seconds - 1,
            }


def _reason(offer: _Offer, won: _Offer, limit_bytes: int) -> str:
    over, slower = offer.held_bytes - limit_bytes, offer.seconds / won.seconds - 1
    if over > 0:
        return f"{format_bytes(over)} over the budget"
    if slower > ALIKE:
        return f"{slower:.0%} slower"
    return "as fast, and takes more memory or computes more again"


def _refused(prices: Prices, budget_bytes: int, name: str) -> DoesNotFit:
    everything = [choice for setting in settings(prices.module) for choice in _uniform(prices.module, setting)]
    least = min(everything, key=prices.held_bytes)
    needed = device_bytes(prices.report(least))
    words = f"micro-batches of {least.micro_batch_size} and recompute {least.recompute[0]}"
    words += f" and ZeRO stage {least.zero_stage}" if least.zero_stage else ""
    over = needed - budget_bytes
    return DoesNotFit(
        f"{name}: a memory budget of {format_bytes(budget_bytes)} is {rounded_up(over)} less than the least it "
        f"needs, {rounded_up(needed)} with {words}; give a larger memory_budget, or a smaller model or sample",
        over_bytes=over,
    )
