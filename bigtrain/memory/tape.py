"""A step in two halves, each run once for many choices: what the passes hold, and what keeps the model. No torch.

The passes of a micro-batch know its size, the dtypes and the recompute policy; weights, states, gradients and what
ranks send know the layout. They meet at calls (a block begins, a gradient is there), in the same order whatever is
chosen. Between two calls only one half changes, so a step of both is their sum, call by call.
"""

from __future__ import annotations

import math
from typing import Any, NamedTuple

from bigtrain.config.model import ModelConfig
from bigtrain.config.schema import Recipe
from bigtrain.ledger import GradientReady, Ledger, Storage
from bigtrain.memory.predict import Step
from bigtrain.sharding.step_cost import Around

BOUNDARIES = ("before_forward", "before_backward")
"""Calls at which a block's forward begins, or the gradient of its output arrives."""


class Moment(NamedTuple):
    """Bytes held now, and the most that were held since the moment before."""

    held: int
    most: int


class Part(NamedTuple):
    """Bytes that a part of a step adds, and the most that it holds, beyond those that were held when it began."""

    added: int
    most: int


class Call(NamedTuple):
    """What the passes tell whoever keeps the model: a method of `Around`, or of a gradient its name and bytes."""

    kind: str
    block: int = 0
    name: str = ""
    size: int = 0


class Passes(NamedTuple):
    """The forward and backward pass of one micro-batch: calls, and what the passes hold up to each.

    What the first call finds is the batch, which lies there until the next one does.
    """

    calls: tuple[Call, ...]
    parts: tuple[Part, ...]


class Kept(NamedTuple):
    """What keeps the model: bytes held before, what is held in each call of each micro-batch, and in the update.

    `block_bytes` are one block's of those held before, `left_bytes` what is there of it besides after each micro-batch.
    """

    held: int
    block_bytes: int
    parts: tuple[tuple[Part, ...], ...]
    left_bytes: tuple[int, ...]
    update: Part


def passes(recipe: Recipe, model: ModelConfig, **machine: Any) -> Passes:
    """Run the passes of one micro-batch with nobody keeping the model, on a machine as `Step` takes it."""
    return _Passing(recipe, model, Ledger(), **machine).record()


def kept(calls: tuple[Call, ...], recipe: Recipe, model: ModelConfig, **machine: Any) -> Kept:
    """Run what keeps the model through a step in which each micro-batch makes these calls."""
    return _Keeping(recipe, model, Ledger(), **machine).record(calls)


def moments(passing: Passes, keeping: Kept) -> list[Moment]:
    """Return what both hold at each boundary, after each micro-batch, and at the end of the step."""
    found = []
    held = most = keeping.held
    first, *others = passing.parts
    calls = [call.kind in BOUNDARIES for call in passing.calls]
    for parts in keeping.parts:
        for boundary, (added, above), (more, beside) in zip(calls, (first, *others), parts, strict=True):
            if held + above > most:
                most = held + above
            held += added
            if boundary:
                found.append(Moment(held, most))
                most = held
            if held + beside > most:
                most = held + beside
            held += more
        found.append(Moment(held, most))
        most = held
        first = Part(0, first.most)  # the batch before is let go of when the next one is there
    return [*found, Moment(held, max(most, held + keeping.update.most))]


class _Cut(Around):
    """Notes each call, and what the passes hold up to it."""

    def __init__(self, ledger: Ledger) -> None:
        self._ledger = ledger
        self._begun = 0
        self.calls: list[Call] = []
        self.parts: list[Part] = []

    def enter(self, *, last: bool) -> None:
        self._note(Call("enter"))

    def turn(self, ready: GradientReady) -> GradientReady:
        self._note(Call("turn"))
        return self._gradient

    def finish(self) -> None:
        self._note(Call("finish"))

    def before_forward(self, index: int) -> None:
        self._note(Call("before_forward", index))

    def after_forward(self, index: int) -> None:
        self._note(Call("after_forward", index))

    def before_backward(self, index: int) -> None:
        self._note(Call("before_backward", index))

    def after_backward(self, index: int) -> None:
        self._note(Call("after_backward", index))

    def _gradient(self, name: str, storage: Storage) -> None:
        self._note(Call("gradient", 0, name, storage.size))

    def _note(self, call: Call) -> None:
        """Note a call; a gradient is let go of when it returns, whoever refers to it until then."""
        ledger = self._ledger
        now = ledger.now - call.size
        self.calls.append(call)
        self.parts.append(Part(now - self._begun, ledger.peak - self._begun))
        ledger.peak = self._begun = now


class _Passing(Step):
    """A step whose passes alone are run."""

    def record(self) -> Passes:
        self._workspace_bytes = 0  # it is no part of the passes
        self._sharding = cut = _Cut(self._ledger)
        self._run_passes(last=True)
        return Passes(tuple(cut.calls), tuple(cut.parts))


class _Keeping(Step):
    """A step that is run without its passes."""

    _taker: GradientReady

    def record(self, calls: tuple[Call, ...]) -> Kept:
        for phase in ("forward", "backward"):
            self._enter(None, phase)  # what an earlier step has left
        held = self._hold_all()
        before = self._ledger.now
        parts, left = [], []
        for index in range(self._micro_batches):
            parts.append(tuple(self._parts(calls, last=index == self._micro_batches - 1)))
            left.append(self._left_bytes())
        began = self._ledger.now
        self._ledger.restart_peak()
        self._run_updates()
        update = Part(self._ledger.now - began, self._ledger.peak - began)
        del held
        return Kept(before, self._block_bytes(), tuple(parts), tuple(left), update)

    def _parts(self, calls: tuple[Call, ...], *, last: bool) -> list[Part]:
        ledger, found = self._ledger, []
        for call in calls:
            began = ledger.now
            ledger.restart_peak()
            self._answer(call, last=last)
            found.append(Part(ledger.now - began, ledger.peak - began))
        return found

    def _answer(self, call: Call, *, last: bool) -> None:
        if call.kind == "enter":
            self._sharding.enter(last=last)
        elif call.kind == "turn":
            self._taker = self._sharding.turn(self._ready)
        elif call.kind == "gradient":
            self._taker(call.name, self._ledger.hold(call.size, "gradients"))
        elif call.kind == "finish":
            self._sharding.finish()
        else:
            getattr(self._sharding, call.kind)(call.block)

    def _block_bytes(self) -> int:
        """Return what is held of the first block whatever runs: its weights and the optimizer's states."""
        block = [name for name in self._shapes if name.startswith("blocks.0.")]
        weights = 0 if self.streaming else sum(math.prod(self._shapes[name]) for name in block)
        states = sum(storage.size for name in block for storage in self._held[name])
        return weights * self._layout.kept_bytes + states

    def _left_bytes(self) -> int:
        """Return what a micro-batch leaves of the first block, each storage once, however many names it has."""
        mine = [storage for name, storage in self._gradients.items() if name.startswith("blocks.0.")]
        return sum({id(storage): storage.size for storage in [*mine, *self._sharding.left(0)]}.values())
