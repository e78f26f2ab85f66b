"""From a recipe to a plan: the same recipe with no `auto` left, what it will hold and how fast it will be."""

from __future__ import annotations

import dataclasses
from collections.abc import Mapping
from dataclasses import dataclass

from bigtrain import units
from bigtrain.config.checks import schedule_faults
from bigtrain.config.dump import to_yaml
from bigtrain.config.model import ModelConfig
from bigtrain.config.schema import Recipe
from bigtrain.config.shape_checks import fault
from bigtrain.config.types import LARGEST
from bigtrain.errors import RecipeError
from bigtrain.memory.report import MemoryReport
from bigtrain.memory.state import model_state
from bigtrain.models import shape
from bigtrain.planner import mechanisms
from bigtrain.planner.choice import Choice
from bigtrain.planner.cluster import for_fewest_nodes
from bigtrain.planner.hardware import Hardware
from bigtrain.planner.links import Transfer
from bigtrain.planner.rejection import Rejected
from bigtrain.planner.search import Point, search
from bigtrain.planner.search import sweep as sweep_search
from bigtrain.planner.settle import labelled_fraction, settled
from bigtrain.planner.speed import Speed, StepSeconds


@dataclass(frozen=True)
class Plan:
    """A recipe in which nothing is open, and what follows from it.

    `memory` and `seconds` are predicted, of one rank's peak and of one step. `flops_per_token` counts forward and
    backward without recomputation, `mfu` those against the rate of matrix products that `rates_source` gives the
    device. `rejected` says why other choices lost, of `searched` ones. `transfers` are what ranks send each other in a
    step.
    """

    recipe: Recipe
    model: ModelConfig
    hardware: Hardware
    world_size: int
    choice: Choice
    memory: MemoryReport
    seconds: StepSeconds
    parameters: int
    flops_per_token: int
    mfu: float
    rates_source: str
    rejected: tuple[Rejected, ...] = ()
    searched: int = 1
    transfers: tuple[Transfer, ...] = ()

    @property
    def micro_batch_size(self) -> int:
        return self.choice.micro_batch_size

    @property
    def accumulation_steps(self) -> int:
        return self.choice.accumulation_steps

    @property
    def budget_bytes(self) -> int:
        """Return the bytes that a device may hold."""
        budget = self.recipe.memory.budget
        assert budget != "auto"
        return budget

    @property
    def tokens_per_step(self) -> int:
        """Return the tokens of a step, all ranks."""
        return self.recipe.train.global_batch_size * self.recipe.data.sequence_length

    @property
    def tokens_per_second(self) -> float:
        """Return the predicted rate, all ranks."""
        return self.tokens_per_step / self.seconds.total

    @property
    def held_bytes(self) -> dict[str, int]:
        """Return the predicted bytes of a rank's peak by cause, without the causes that hold nothing then."""
        return {cause: size for cause, size in self.memory.by_cause.items() if size}

    @property
    def state_bytes(self) -> Mapping[str, int]:
        """Return the bytes of weights, gradients and optimizer states that a rank keeps, by cause."""
        accumulated = self.accumulation_steps > 1
        device, size = self.hardware.kind, self.world_size
        return model_state(self.recipe, self.model, accumulated=accumulated, device=device, world_size=size)

    @property
    def total_steps(self) -> int | None:
        """Return the length of the run in steps; None when it is given in epochs and the data are not counted yet."""
        train = self.recipe.train
        if train.tokens is not None:
            return -(-train.tokens // (train.global_batch_size * self.recipe.data.sequence_length))
        return train.steps

    @property
    def loss_chunk_tokens(self) -> int:
        """Return how many positions' logits the loss may hold at a time."""
        budget = self.recipe.memory.budget
        assert budget != "auto"
        return shape.loss_chunk_tokens(self.model.padded_vocab_size, self.hardware.kind, budget)

    @property
    def warnings(self) -> tuple[str, ...]:
        """Return what is allowed and probably not wanted, each with what to do instead."""
        return tuple(mechanisms.warnings(self.recipe, self.hardware, self.model.initializer_range, self.world_size))

    def with_rows(self, rows: int) -> Plan:
        """Return the plan with `epochs` turned into steps, now that an epoch is known to have so many rows.

        Raises RecipeError if the schedule of the learning rate turns out not to fit the run.
        """
        train = self.recipe.train
        if train.epochs is None:
            return self
        steps = max(1, round(train.epochs * rows / train.global_batch_size))
        if steps > LARGEST:
            text = f"{train.epochs:g} epochs are more steps than can be counted; use fewer"
            raise RecipeError(fault(self.recipe, "train.epochs", text))
        if faults := [*schedule_faults(self.recipe, steps)]:
            raise RecipeError(*faults)
        train = train.model_copy(update={"epochs": None, "steps": steps})
        return dataclasses.replace(self, recipe=self.recipe.model_copy(update={"train": train}))

    def as_object(self) -> dict[str, object]:
        """Return what `bigtrain plan --json` prints."""
        return {
            "choice": self.choice.as_object(),
            "memory": self.memory.as_object(),
            "speed": {
                "seconds_per_step": self.seconds.total,
                "tokens_per_second": self.tokens_per_second,
                "mfu": self.mfu,
                "rates": self.rates_source,
                "tokens_per_second_per_rank": self.tokens_per_second / self.world_size,
            },
            "communication": {
                "seconds": sum(sent.seconds for sent in self.transfers),
                "exposed_seconds": self.seconds.communication_seconds,
                "collectives": [sent.as_object() for sent in self.transfers],
            },
            "parameters": self.parameters,
            "flops_per_token": self.flops_per_token,
            "rejected": [entry.as_object() for entry in self.rejected],
            "searched": self.searched,
            "steps": self.total_steps,
            "device": self.hardware.name,
            "world_size": self.world_size,
            "memory_budget_bytes": self.budget_bytes,
        }

    def to_yaml(self) -> str:
        """Return the plan as a recipe, its predictions as comments."""
        comments = {
            "model": f"{units.format_count(self.parameters)} parameters, "
            f"{units.format_flops(self.flops_per_token)} per token, forward and backward",
            "train": f"{self.accumulation_steps} micro-batches per step and rank",
            "memory": f"predicted: {units.format_bytes(self.memory.device_bytes_peak or 0)} of the device at the peak; "
            + "; ".join(f"{cause} {units.format_bytes(size)}" for cause, size in self.held_bytes.items()),
        }
        return to_yaml(for_fewest_nodes(self.recipe, self.world_size), comments=comments)


def plan(
    recipe: Recipe, hardware: Hardware | None = None, *, world_size: int | None = None, bounded: bool = True
) -> Plan:
    """Resolve a recipe for some hardware, this machine's by default: the fastest choice that fits the memory budget.

    `world_size` ranks in place of those that the recipe names. Without `bounded` anything fits: for evaluation, which
    holds less than training. Raises RecipeError where the recipe asks for what is not there, DoesNotFit where nothing
    that it leaves open fits.
    """
    open_recipe, model, hardware, ranks = settled(recipe, hardware, world_size, bounded=bounded)
    found = search(open_recipe, model, hardware, ranks)
    flops = shape.flops_per_token(model, recipe.data.sequence_length, labelled_fraction(recipe))
    speed = Speed(open_recipe, model, hardware, ranks)
    return Plan(
        recipe=found.choice.into(open_recipe),
        model=model,
        hardware=hardware,
        world_size=ranks,
        choice=found.choice,
        memory=found.memory,
        seconds=found.seconds,
        parameters=shape.parameters(model),
        flops_per_token=flops,
        mfu=speed.mfu(found.seconds, flops),
        rates_source=speed.source,
        rejected=tuple(found.rejected),
        searched=found.searched,
        transfers=tuple(speed.transfers(found.choice)) if ranks > 1 else (),
    )


def sweep(recipe: Recipe, hardware: Hardware | None = None, *, world_size: int | None = None) -> list[Point]:
    """Return the fastest choice within budgets up to the recipe's own, each the square root of 2 below the next.

    Raises RecipeError as `plan` does; where nothing fits, a point says so.
    """
    open_recipe, model, hardware, ranks = settled(recipe, hardware, world_size)
    largest = open_recipe.memory.budget
    assert largest != "auto"
    budgets = [int(largest * 2 ** (-place / 2)) for place in reversed(range(SWEEP_POINTS))]
    return sweep_search(open_recipe, model, hardware, ranks, budgets)


SWEEP_POINTS = 12
"""From a forty-fifth of the largest budget to all of it."""
