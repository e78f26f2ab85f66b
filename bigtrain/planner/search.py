"""The fastest choice that fits the memory budget, among all that a recipe leaves open. No torch.

`candidates` lists the choices, `offers` prices them, `ranking` finds the best, `rejection` and `refusal` say why.
"""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass

from bigtrain.config.model import ModelConfig
from bigtrain.config.schema import Recipe
from bigtrain.config.shape_checks import fault
from bigtrain.config.tensor_parallel import data_ranks
from bigtrain.errors import DoesNotFit, RecipeError
from bigtrain.memory.report import MemoryReport
from bigtrain.planner.candidates import mixes, settings
from bigtrain.planner.choice import Choice
from bigtrain.planner.hardware import Hardware
from bigtrain.planner.mechanisms import mechanism_faults
from bigtrain.planner.offers import Offers
from bigtrain.planner.ranking import Best, fastest
from bigtrain.planner.refusal import refused
from bigtrain.planner.rejection import Rejected, rejected
from bigtrain.planner.speed import StepSeconds
from bigtrain.units import format_bytes


@dataclass(frozen=True)
class Found:
    """The choice, its prices, and why others lost; `searched` choices were compared, `priced` of them one by one.

    The rest cannot be faster than the choice: they compute more again than others that fit, or a step without any
    recomputation takes longer.
    """

    choice: Choice
    memory: MemoryReport
    seconds: StepSeconds
    rejected: tuple[Rejected, ...]
    searched: int
    priced: int


@dataclass(frozen=True)
class Point:
    """The fastest choice within a budget; None where nothing fits."""

    budget_bytes: int
    choice: Choice | None
    tokens_per_second: float | None

    def as_object(self) -> dict[str, object]:
        """Return what `bigtrain plan --sweep --json` prints."""
        choice = None if self.choice is None else self.choice.as_object()
        return {"budget_bytes": self.budget_bytes, "choice": choice, "tokens_per_second": self.tokens_per_second}


def search(recipe: Recipe, model: ModelConfig, hardware: Hardware, world_size: int) -> Found:
    """Return the fastest choice that fits, for a recipe that is settled but for what the planner chooses.

    Raises RecipeError for mechanisms that do not go together, with the device or with the ranks, and DoesNotFit, with
    the cheapest change that would fit.
    """
    check(recipe, hardware, world_size)
    offers = Offers(recipe, model, hardware, world_size)
    found = fastest(offers)
    if found is None:
        raise refused(offers)
    check_host(recipe, hardware, found)
    space = settings(recipe, hardware, world_size)
    rows = mixes(recipe, model.num_hidden_layers, hardware)
    return Found(
        choice=found.choice,
        memory=found.memory,
        seconds=offers.seconds(found.choice),
        rejected=rejected(offers, found),
        searched=len(space) * sum(map(len, rows)),
        priced=offers.priced,
    )


def check_host(recipe: Recipe, hardware: Hardware, found: Best) -> None:
    """Raise DoesNotFit where what a rank has on the host, offloaded or copied to be saved, is more than its share."""
    row, needed = hardware.device, found.memory.host_bytes_peak or 0
    if hardware.kind == "cpu" or row is None or needed <= row.host_memory_bytes:
        return
    over, there = needed - row.host_memory_bytes, format_bytes(row.host_memory_bytes)
    key, change, use = "sharding.offload", "sharding.offload=none", "optimizer, none, or more ranks"
    if recipe.checkpoint.asynchronous:
        use = f"checkpoint.asynchronous=false, {use}"
        if found.choice.offload == "none":
            key, change, use = "checkpoint.asynchronous", "checkpoint.asynchronous=false", "false, or more ranks"
    value = "true" if key == "checkpoint.asynchronous" else found.choice.offload
    text = f"{value}: {format_bytes(needed)} of a rank on the host are {format_bytes(over)} more than its {there}"
    raise DoesNotFit(fault(recipe, key, f"{text}; use {use}"), over_bytes=over, change=change)


def sweep(
    recipe: Recipe, model: ModelConfig, hardware: Hardware, world_size: int, budgets: Iterable[int]
) -> list[Point]:
    """Return the fastest choice within each budget, in bytes. Raises RecipeError as `search` does."""
    check(recipe, hardware, world_size)
    offers, points = Offers(recipe, model, hardware, world_size), []
    for budget in budgets:
        offers = offers.within(budget)
        found = fastest(offers)
        if found is None:
            points.append(Point(budget, None, None))
        else:
            rate = offers.speed.tokens_per_second(offers.seconds(found.choice))
            points.append(Point(budget, found.choice, rate))
    return points


def check(recipe: Recipe, hardware: Hardware, world_size: int) -> None:
    """Raise RecipeError for mechanisms that do not go together, with the device or with the ranks."""
    rows, micro = recipe.train.global_batch_size // data_ranks(recipe, world_size), recipe.train.micro_batch_size
    steps = rows // micro if micro != "auto" else 1
    if faults := mechanism_faults(recipe, hardware, steps, world_size):
        raise RecipeError(*faults)
