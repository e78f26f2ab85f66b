"""The peak of a step under any mix of recompute policies in microseconds, from parts that are computed once. No torch.

Blocks are alike, so a model of two or three blocks has all parts of a deeper one. Cut at the moments when a block's
forward begins and when the gradient of its output arrives, a micro-batch is

    forward of every block but the last | last forward, head, loss | backward of every block but the first | the rest

and each part adds as many bytes, and at worst holds as many beyond those that were there, wherever it stands: that
depends on its block's policy alone, and with sharding on whether it is the first or the last one's. `memory.predict`
runs the parts, so that whatever it counts is in them; the sum is what it would find for the whole, to the byte. Only
where parameters come from the host block by block, a part may depend on its neighbour's policy: within 1%.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Callable, Iterable, Sequence
from contextlib import suppress
from itertools import groupby
from typing import Any, NamedTuple, TypeAlias

from bigtrain.config.model import ModelConfig
from bigtrain.config.schema import Recipe
from bigtrain.ledger import Gradients, Ledger, Storage, Value
from bigtrain.memory.layout import layout_of
from bigtrain.memory.predict import Step, torch_threads
from bigtrain.recompute.cost import RANDOM_STATE_BYTES

Runs: TypeAlias = "tuple[tuple[str, int], ...]"
"""A policy for each block, as policies with how many blocks in a row have them, all at least one."""

ALONE_BLOCKS, SHARDED_BLOCKS = 2, 3
"""Blocks of a model that has all parts. Sharded, those at the ends differ: no neighbour on one side to gather for."""


class Moment(NamedTuple):
    """Bytes held now, and the most that were held since the moment before."""

    held: int
    most: int


class Part(NamedTuple):
    """Bytes that a part of a step adds, and the most that it holds, beyond those that were held when it began."""

    added: int
    most: int


NOTHING = Part(0, 0)


class Parts(NamedTuple):
    """The parts of a micro-batch under one policy, in order; `forward` and `backward` are those of blocks between."""

    first: Part
    forward: Part
    turn: Part
    last: Part
    backward: Part
    rest: Part


class Composer:
    """The peaks of one recipe under all mixes of policies; takes what `predict` takes. `peaks` are those asked for."""

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
    ) -> None:
        self._recipe, self._model = recipe, model
        self._machine: dict[str, Any] = {
            "device": device,
            "slow_bf16": slow_bf16,
            "world_size": world_size,
            "threads": threads or torch_threads(),
            "workspace_bytes": workspace_bytes,
        }
        self.peaks: dict[Runs, int] = {}
        self._alone = layout_of(recipe, world_size).alone
        self._blocks = min(model.num_hidden_layers, ALONE_BLOCKS if self._alone else SHARDED_BLOCKS)
        self._parts: dict[str, list[Parts]] = {}
        self._begins: list[int] = []
        """What is held when the first block begins to run, in each micro-batch that counts."""
        self._before = 0
        """The most that is held before the first of them."""
        self._state: tuple[int, int] | None = None

    def peak_bytes(self, runs: Runs) -> int:
        """Return the allocated peak that `predict` gives for blocks with these policies, the first block's first."""
        found = self.peaks.get(runs)
        if found is None:
            found = self.peaks[runs] = self._peak_bytes(runs)
        return found

    def _peak_bytes(self, runs: Runs) -> int:
        parts = [self._parts.get(policy) or self._measured(policy) for policy, _ in runs]
        between = [count for _, count in runs]
        between[0] -= 1
        between[-1] -= 1
        peak = self._before
        several = self._model.num_hidden_layers > 1
        for number, held in enumerate(self._begins):
            first, last = parts[0][number], parts[-1][number]
            if several:
                peak, held = max(peak, held + first.first.most), held + first.first.added
                for place, count in enumerate(between):
                    if count > 0:
                        added, most = parts[place][number].forward
                        peak = max(peak, held + most, held + most + (count - 1) * added)
                        held += count * added
            peak, held = max(peak, held + last.turn.most), held + last.turn.added
            if several:
                peak, held = max(peak, held + last.last.most), held + last.last.added
                for place in range(len(between) - 1, -1, -1):
                    if between[place] > 0:
                        (added, most), count = parts[place][number].backward, between[place]
                        peak = max(peak, held + most, held + most + (count - 1) * added)
                        held += count * added
            peak = max(peak, held + first.rest.most)
        return peak

    @property
    def state_bytes(self) -> int:
        """Return what is held when the first block begins to run: weights, the optimizer's states, the first input."""
        held, each = self._begun()
        return held + each * (self._model.num_hidden_layers - self._blocks)

    def floor_bytes(self, policy: str) -> int:
        """Return bytes that any mix reaches at least in the last block's turn, from the policy that keeps the least.

        That one keeps a block's input, or not even this, and the generator's state; all others keep the input too.
        """
        blocks, floors = self._model.num_hidden_layers, []
        for held, parts in zip(self._begins_under(policy), self._parts[policy], strict=True):
            kept = parts.first.added + parts.forward.added * (blocks - 2) if blocks > 1 else 0
            floors.append(held + kept + parts.turn.most - RANDOM_STATE_BYTES * blocks)
        return max(floors)

    def _begins_under(self, policy: str) -> list[int]:
        if policy not in self._parts:
            self._measured(policy)
        return self._begins

    def _measured(self, policy: str) -> list[Parts]:
        """Run a step of few blocks with this policy, and take it apart."""
        step = self._step(policy, self._blocks)
        step.run()
        pairs = zip(step.moments, step.moments[1:], strict=False)
        parts = [Part(end.held - begin.held, end.most - begin.held) for begin, end in pairs]
        size, turn = 2 * self._blocks, self._blocks - 1
        cuts = range(0, len(parts), size)
        found = [_parts(parts[cut : cut + size], turn) for cut in cuts]
        # Without sharding the last micro-batch has the peak: the first does the same, with fewer gradients there.
        kept = found[-1:] if self._alone else found
        if not self._begins:
            self._begin([step.moments[cut] for cut in cuts], found, len(kept))
        self._parts[policy] = kept
        return kept

    def _begin(self, moments: Sequence[Moment], found: Sequence[Parts], kept: int) -> None:
        """Note how micro-batches begin, with as many blocks more as the model has."""
        more = self._model.num_hidden_layers - self._blocks
        each = self._begun()[1] if more else 0
        begins = []
        for moment, parts in zip(moments, found, strict=True):
            begins.append(Moment(moment.held + each * more, moment.most + each * more))
            each += parts.forward.added + parts.backward.added  # what a micro-batch leaves: gradients
        self._begins = [moment.held for moment in begins[-kept:]]
        self._before = begins[-kept].most

    def _begun(self) -> tuple[int, int]:
        """Return what few blocks hold when the first begins to run, and what one more adds to it."""
        if self._state is None:
            few, more = (self._held_at_first(self._blocks + extra) for extra in (0, 1))
            self._state = few, more - few
        return self._state

    def _held_at_first(self, blocks: int) -> int:
        step = self._step("none", blocks)
        step.stops = True
        with suppress(_Begun):
            step.run()
        return step.moments[0].held

    def _step(self, policy: str, blocks: int) -> _MarkedStep:
        recompute = self._recipe.recompute.model_copy(update={"policy": policy})
        recipe = self._recipe.model_copy(update={"recompute": recompute})
        model = dataclasses.replace(self._model, num_hidden_layers=blocks)
        return _MarkedStep(recipe, model, Ledger(), **self._machine)


class _MarkedStep(Step):
    """A step that notes what is held where its parts begin; with `stops` it ends at the first of them."""

    def __init__(self, recipe: Recipe, model: ModelConfig, ledger: Ledger, **machine: Any) -> None:
        super().__init__(recipe, model, ledger, **machine)
        self.moments: list[Moment] = []
        self.stops = False

    def run(self) -> None:
        for phase in ("forward", "backward"):
            self._enter(None, phase)  # what an earlier step has left
        super().run()
        self._mark()

    def _run_block(self, index: int, forward: Callable[[Value], Value], value: Value) -> Value:
        self._mark()
        if self.stops:
            raise _Begun
        out = super()._run_block(index, forward, value)
        return self._ledger.made(out.storage, [out], self._ledger.keep([]), self._arrived)

    def _arrived(self, gradient: Storage, kept: list[Storage]) -> Gradients:
        self._mark()
        return Gradients([gradient], [])

    def _mark(self) -> None:
        self.moments.append(Moment(self._ledger.now, self._ledger.peak))
        self._ledger.restart_peak()


class _Begun(Exception):
    """The first block's forward begins."""


def _parts(parts: Sequence[Part], turn: int) -> Parts:
    """Name the parts of a micro-batch; where there is no block between, those at the ends are like it."""
    if not turn:  # a single block has no more than its turn and the rest
        return Parts(NOTHING, NOTHING, parts[0], NOTHING, NOTHING, parts[1])
    return Parts(parts[0], parts[turn - 1], parts[turn], parts[turn + 1], parts[-2], parts[-1])


def runs_of(policies: Iterable[str]) -> Runs:
    """Return a list of policies, one per block, as runs of equal ones."""
    return tuple((policy, len(list(blocks))) for policy, blocks in groupby(policies))
