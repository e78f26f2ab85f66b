"""What choices hold and how long they take, each found once. No torch."""

from __future__ import annotations

import dataclasses
from bisect import bisect_left, bisect_right
from collections.abc import Callable, Iterator, Sequence
from math import inf
from typing import NamedTuple

from bigtrain.config.model import ModelConfig
from bigtrain.config.schema import Recipe
from bigtrain.memory.compose import Composer, Runs, Tapes, runs_of
from bigtrain.memory.report import MemoryReport
from bigtrain.models.shape import loss_chunk_tokens
from bigtrain.planner.candidates import policies
from bigtrain.planner.choice import Choice
from bigtrain.planner.hardware import Hardware
from bigtrain.planner.price import memory_of, workspace_bytes
from bigtrain.planner.speed import Speed, StepSeconds


class Offer(NamedTuple):
    """A choice with the seconds of a step and the allocated peak of a rank."""

    choice: Choice
    seconds: float
    allocated_bytes: int


class Offers:
    """The choices of one recipe on one kind of hardware."""

    def __init__(self, recipe: Recipe, model: ModelConfig, hardware: Hardware, world_size: int) -> None:
        self.recipe, self.model, self.hardware, self.world_size = recipe, model, hardware, world_size
        self.speed = Speed(recipe, model, hardware, world_size)
        self._composers: dict[Choice, Composer] = {}
        self._tapes = Tapes()
        self._bounds: dict[Choice, float] = {}
        self._reports: dict[Choice, MemoryReport] = {}

    @property
    def budget_bytes(self) -> int:
        budget = self.recipe.memory.budget
        assert isinstance(budget, int)
        return budget

    def within(self, budget_bytes: int) -> Offers:
        """Return the same within another budget; of it, what a step takes knows only how many logits it may hold."""
        recipe = changed(self.recipe, "memory.budget", budget_bytes)
        other = Offers(recipe, self.model, self.hardware, self.world_size)
        rows, kind = self.model.padded_vocab_size, self.hardware.kind
        if loss_chunk_tokens(rows, kind, budget_bytes) == loss_chunk_tokens(rows, kind, self.budget_bytes):
            other.speed, other._composers, other._bounds = self.speed, self._composers, self._bounds
        return other

    def of(self, choice: Choice) -> Offer:
        """Return a choice with its prices."""
        setting = dataclasses.replace(choice, recompute=())
        return Offer(choice, self.speed.seconds(choice).total, self.allocated_bytes(setting, runs_of(choice.recompute)))

    def seconds(self, choice: Choice) -> StepSeconds:
        """Return the predicted seconds of a step."""
        return self.speed.seconds(choice)

    def least_seconds(self, setting: Choice, rows: Sequence[Sequence[Runs]]) -> float:
        """Return what a step takes at least: the first mix computes the least again."""
        found = self._bounds.get(setting)
        if found is None:
            found = self._bounds[setting] = self.speed.seconds(chosen(setting, rows[0][0])).total
        return found

    def allocated_bytes(self, setting: Choice, mix: Runs) -> int:
        """Return the allocated peak of one rank."""
        return self._composer(setting).peak_bytes(mix)

    @property
    def priced(self) -> int:
        """Return how many choices' memory was asked for."""
        return sum(len(composer.peaks) for composer in self._composers.values())

    def report(self, choice: Choice) -> MemoryReport:
        """Return all of a choice's memory, found by a whole step: what the allocator reserves needs one."""
        if choice not in self._reports:
            recipe = choice.into(self.recipe)
            self._reports[choice] = memory_of(recipe, self.model, self.hardware, self.world_size)
        return self._reports[choice]

    def fitting(
        self, setting: Choice, rows: Sequence[Sequence[Runs]], limit_bytes: int, slowest_seconds: float = inf
    ) -> Iterator[Offer]:
        """Yield, of the mixes that `candidates.mixes` lists, those that fit and may be the fastest that do.

        Left out is what computes at least as much of every block again as one that fits, or as one that is too slow.
        """
        composer = self._composer(setting)
        lightest = None  # how many blocks compute something again in the lightest mix that fits, of those so far
        for whole, row in enumerate(rows[: self._quick(setting, rows, slowest_seconds)]):
            end = len(row) if lightest is None else min(len(row), lightest - whole)
            part = first_within(limit_bytes, end, row, composer.turn_bytes, composer.peak_bytes)
            if part is not None:
                lightest = whole + part
                choice = chosen(setting, row[part])
                yield Offer(choice, self.speed.seconds(choice).total, composer.peak_bytes(row[part]))
            if lightest is not None and whole + 1 >= lightest:
                return

    def _quick(self, setting: Choice, rows: Sequence[Sequence[Runs]], slowest_seconds: float) -> int:
        """Return how many rows begin with a mix that is no slower: each row computes more again than the one before."""
        if slowest_seconds == inf:
            return len(rows)
        return bisect_right(rows, slowest_seconds, key=lambda row: self.speed.seconds(chosen(setting, row[0])).total)

    def floor_bytes(self, setting: Choice, rows: Sequence[Sequence[Runs]]) -> int:
        """Return bytes that the allocated peak of each of these mixes reaches at least: the last keeps the least."""
        composer, last = self._composer(setting), rows[-1][-1]
        return composer.floor_bytes(last[0][0]) if len(last) == 1 else composer.peak_bytes(last)

    def state_bytes(self, setting: Choice) -> int:
        """Return what is held from before the forward pass on, whatever is recomputed."""
        return self._composer(setting).state_bytes

    def least_bytes(self, setting: Choice, rows: Sequence[Sequence[Runs]]) -> tuple[int, Choice]:
        """Return the least that a setting can hold, and with which mix."""
        composer = self._composer(setting)
        pairs = []
        for row in rows:
            mix = row[least_place(row, composer.peak_bytes)]
            pairs.append((composer.peak_bytes(mix), mix))
        held, mix = min(pairs, key=lambda pair: pair[0])
        return held, chosen(setting, mix)

    def _composer(self, setting: Choice) -> Composer:
        found = self._composers.get(setting)
        if found is None:
            found = self._composers[setting] = Composer(
                dataclasses.replace(setting, recompute=("none",)).into(self.recipe),
                self.model,
                device=self.hardware.kind,
                slow_bf16=self.hardware.slow_bf16,
                world_size=self.world_size,
                threads=self.hardware.threads,
                workspace_bytes=workspace_bytes(self.hardware),
                tapes=self._tapes,
            )
        return found


EDGE = 2
"""Mixes at each end of a row whose blocks differ in more than number from those between.

Between, one block after another changes its policy, so that each moment's bytes change by as much each time, and the
peak, the most of them, is convex.
"""


def first_within(limit: int, end: int, row: Sequence[Runs], *held: Callable[[Runs], int]) -> int | None:
    """Return the first place before `end` of a row where each of these is within a limit, or None.

    Each has to be convex between the edges, so above the line through two of its points: places are passed over.
    """
    place = 0
    while place < end:
        over = next((size for size in held if size(row[place]) > limit), None)
        if over is None:
            return place
        if EDGE <= place < len(row) - EDGE - 1:
            now = over(row[place])
            falling = now - over(row[place + 1])
            needed = place - (limit - now) // falling if falling > 0 else len(row)
            place = min(needed, len(row) - EDGE)
        else:
            place += 1
    return None


def least_place(row: Sequence[Runs], peak: Callable[[Runs], int]) -> int:
    """Return the place of a row's least peak."""
    between = range(EDGE, len(row) - EDGE)
    edges = [place for place in range(len(row)) if place not in between]
    if between:
        rising = bisect_left(between[1:], 0, key=lambda place: peak(row[place]) - peak(row[place - 1]))
        edges.append(between[rising])
    return min(sorted(edges), key=lambda place: peak(row[place]))


def chosen(setting: Choice, mix: Runs) -> Choice:
    """Return a setting with one policy for each block."""
    return Choice(
        setting.micro_batch_size,
        setting.accumulation_steps,
        policies(mix),
        setting.zero_stage,
        setting.replicate,
        setting.offload,
        setting.optimizer_state,
        setting.gradient_release,
        setting.master_weights,
    )


def changed(recipe: Recipe, key: str, value: object) -> Recipe:
    """Return a recipe with another value for a dotted key, its type not looked at."""
    section, _, name = key.partition(".")
    return recipe.model_copy(update={section: getattr(recipe, section).model_copy(update={name: value})})
