"""The peak of a step under any mix of recompute policies in microseconds, from parts that are computed once. No torch.

Blocks are alike, so a model of two or three blocks has all parts of a deeper one. Cut at the moments when a block's
forward begins and when the gradient of its output arrives, a micro-batch is

    forward of every block but the last | last forward, head, loss | backward of every block but the first | the rest

and each part adds as many bytes, and at worst holds as many beyond those that were there, wherever it stands: that
depends on its block's policy alone, and with sharding on whether it is the first or the last one's. `memory.tape` runs
the parts as `memory.predict` does, the passes once for each micro-batch and policy, what keeps the model once for each
layout, so that whatever that counts is in them; the sum is what it would find for the whole, to the byte.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Hashable, Iterable, Sequence
from itertools import groupby, pairwise
from typing import Any, NamedTuple, TypeAlias

from bigtrain.config.model import ModelConfig
from bigtrain.config.schema import Recipe
from bigtrain.config.tensor_parallel import data_ranks
from bigtrain.memory.layout import layout_of
from bigtrain.memory.predict import MICRO_BATCHES_TO_PEAK, micro_batch, step_numbers, torch_threads
from bigtrain.memory.tape import Kept, Moment, Part, Passes, kept, moments, passes
from bigtrain.recompute.cost import RANDOM_STATE_BYTES

Runs: TypeAlias = "tuple[tuple[str, int], ...]"
"""A policy for each block, as policies with how many blocks in a row have them, all at least one."""

ALONE_BLOCKS, SHARDED_BLOCKS = 2, 3
"""Blocks of a model that has all parts. Sharded, those at the ends differ: no neighbour on one side to gather for."""


NOTHING = Part(0, 0)


class Parts(NamedTuple):
    """The parts of a micro-batch under one policy, in order; `forward` and `backward` are those of blocks between."""

    first: Part
    forward: Part
    turn: Part
    last: Part
    backward: Part
    rest: Part


class Tapes:
    """Both halves of steps that were run for other choices of one recipe, one model and one machine."""

    def __init__(self) -> None:
        self.passes: dict[Hashable, Passes] = {}
        self.kept: dict[Hashable, Kept] = {}


class Composer:
    """The peaks of one recipe under all mixes of policies; takes what `predict` takes. `peaks` are those asked for.

    `tapes` are shared with the composers of other choices.
    """

    def __init__(
        self,
        recipe: Recipe,
        model: ModelConfig,
        *,
        device: str,
        slow_bf16: bool,
        world_size: int = 1,
        threads: int | None = None,
        workspace_bytes: int = 0,
        tapes: Tapes | None = None,
    ) -> None:
        self._recipe = recipe
        self._machine: dict[str, Any] = {
            "device": device,
            "slow_bf16": slow_bf16,
            "world_size": world_size,
            "threads": threads or torch_threads(),
            "workspace_bytes": workspace_bytes,
        }
        self._tapes = tapes or Tapes()
        self.peaks: dict[Runs, int] = {}
        self._layout = layout = layout_of(recipe, world_size)
        micro = recipe.train.micro_batch_size
        assert micro != "auto"
        self._batch = micro_batch(recipe, micro)
        self._accumulation_steps = recipe.train.global_batch_size // data_ranks(recipe, world_size) // micro
        self._blocks = model.num_hidden_layers
        few = min(self._blocks, ALONE_BLOCKS if layout.alone else SHARDED_BLOCKS)
        self._more, self._few = self._blocks - few, dataclasses.replace(model, num_hidden_layers=few)
        self._parts: dict[str, list[Parts]] = {}
        self._begins: list[int] = []
        """What is held when the first block begins to run, in each micro-batch that counts."""
        self._outside = 0
        """The most that is held before, between and after micro-batches."""

    def peak_bytes(self, runs: Runs) -> int:
        """Return the allocated peak that `predict` gives for blocks with these policies, the first block's first."""
        found = self.peaks.get(runs)
        if found is None:
            found = self.peaks[runs] = self._peak_bytes(runs)
        return found

    def _peak_bytes(self, runs: Runs) -> int:
        policies = [self._parts.get(policy) or self._measured(policy) for policy, _ in runs]
        between = [count for _, count in runs]
        between[0] -= 1
        between[-1] -= 1
        most = self._outside
        for number, held in enumerate(self._begins):
            parts = [of_policy[number] for of_policy in policies]
            first, last = parts[0], parts[-1]
            steps = [(last.turn, 1), (first.rest, 1)]
            if self._blocks > 1:
                forward = [(part.forward, count) for part, count in zip(parts, between, strict=True) if count]
                backward = [(part.backward, count) for part, count in zip(parts, between, strict=True) if count]
                backward.reverse()
                steps = [(first.first, 1), *forward, (last.turn, 1), (last.last, 1), *backward, (first.rest, 1)]
            for (added, above), count in steps:
                peak = held + above
                held += count * added
                if added > 0:
                    peak += (count - 1) * added
                if peak > most:
                    most = peak
        return most

    def turn_bytes(self, runs: Runs) -> int:
        """Return what is held in the last block's turn, when all that is kept for the backward pass is there.

        The peak is no less, and this takes less time.
        """
        parts = [(self._parts.get(policy) or self._measured(policy))[-1] for policy, _ in runs]
        held = self._begins[-1] + parts[-1].turn.most
        if self._blocks > 1:
            held += parts[0].first.added - parts[0].forward.added - parts[-1].forward.added
            for part, (_, count) in zip(parts, runs, strict=True):
                held += part.forward.added * count
        return held

    @property
    def state_bytes(self) -> int:
        """Return what is held all the time: weights, the optimizer's states and its buffers."""
        found = self._kept()
        return found.held + found.block_bytes * self._more

    def floor_bytes(self, policy: str) -> int:
        """Return bytes that any mix reaches at least in the last block's turn, from the policy that keeps the least.

        That one keeps a block's input, or not even this, and the generator's state; all others keep the input too.
        """
        blocks, floors = self._blocks, []
        for held, parts in zip(self._begins_under(policy), self._parts[policy], strict=True):
            kept = parts.first.added + parts.forward.added * (blocks - 2) if blocks > 1 else 0
            floors.append(held + kept + parts.turn.most - RANDOM_STATE_BYTES * blocks)
        return max(floors)

    def _begins_under(self, policy: str) -> list[int]:
        if policy not in self._parts:
            self._measured(policy)
        return self._begins

    def _measured(self, policy: str) -> list[Parts]:
        """Take a step of few blocks with this policy apart."""
        marks = moments(self._passes(policy), self._kept())
        parts = [Part(end.held - begin.held, end.most - begin.held) for begin, end in pairwise(marks)]
        size, turn = 2 * self._few.num_hidden_layers, self._few.num_hidden_layers - 1
        cuts = range(0, len(parts), size + 1)
        found = [_parts(parts[cut : cut + size], turn) for cut in cuts]
        # Without sharding the last micro-batch has the peak: the first does the same, with fewer gradients there.
        counting = found[-1:] if self._layout.alone else found
        if not self._begins:
            self._begin(marks[:: size + 1][: len(found)], marks[size + 1 :: size + 1])
            self._begins = self._begins[-len(counting) :]
        self._parts[policy] = counting
        return counting

    def _begin(self, begins: Sequence[Moment], nexts: Sequence[Moment]) -> None:
        """Note what micro-batches find, and the most outside of the blocks, with as many blocks more as there are.

        Between micro-batches, and in the update, there are weights, states and gradients, whatever is recomputed.
        """
        keeping = self._kept()
        before = keeping.block_bytes * self._more
        after = [before + left * self._more for left in keeping.left_bytes]
        self._begins = [mark.held + more for mark, more in zip(begins, [before, *after], strict=False)]
        outside = [mark.most + more for mark, more in zip(nexts, after, strict=True)]
        self._outside = max(begins[0].most + before, *outside)

    def _passes(self, policy: str) -> Passes:
        """Return the passes of few blocks under a policy."""
        recipe = self._recipe
        numbers = step_numbers(recipe, self._layout, slow_bf16=self._machine["slow_bf16"])
        key = (self._batch, numbers, self._few.num_hidden_layers, policy)
        found = self._tapes.passes.get(key)
        if found is None:
            found = self._tapes.passes[key] = passes(self._under(policy), self._few, **self._machine)
        return found

    def _under(self, policy: str) -> Recipe:
        recompute = self._recipe.recompute.model_copy(update={"policy": policy})
        return self._recipe.model_copy(update={"recompute": recompute})

    def _kept(self) -> Kept:
        """Return what keeps the model through a step; calls are the same under all policies."""
        recipe = self._recipe
        key = (
            self._layout,
            *(recipe.optimizer.name, recipe.optimizer.state, recipe.optimizer.gradient_release),
            recipe.amp.master_weights,
            min(self._accumulation_steps, MICRO_BATCHES_TO_PEAK),
        )
        found = self._tapes.kept.get(key)
        if found is None:
            found = self._tapes.kept[key] = kept(
                self._passes("full").calls, self._under("full"), self._few, **self._machine
            )
        return found


def _parts(parts: Sequence[Part], turn: int) -> Parts:
    """Name the parts of a micro-batch; where there is no block between, those at the ends are like it."""
    if not turn:  # a single block has no more than its turn and the rest
        return Parts(NOTHING, NOTHING, parts[0], NOTHING, NOTHING, parts[1])
    return Parts(parts[0], parts[turn - 1], parts[turn], parts[turn + 1], parts[-2], parts[-1])


def runs_of(policies: Iterable[str]) -> Runs:
    """Return a list of policies, one per block, as runs of equal ones."""
    return tuple((policy, len(list(blocks))) for policy, blocks in groupby(policies))
