"""A whole training step of any model on fake tensors: every allocation with its cause and the block that made it.

Where `trace_model` adds up parts, this runs all of them: it takes as long as the model is deep, and needs no assumption
about how blocks follow one another.
"""

from __future__ import annotations

from bisect import bisect_right
from collections.abc import Callable, Iterable, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass
from itertools import chain
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn
from torch.optim import Optimizer

from bigtrain.memory.marks import place_of, tensors_in
from bigtrain.memory.predict import FIRST_STEP, MICRO_BATCHES_TO_PEAK, SECOND_STEP
from bigtrain.memory.record import Recording
from bigtrain.memory.trace import Clock, Counting, seconds_of


@dataclass(frozen=True)
class Run:
    """What a step consists of, on fake tensors: a forward pass, the backward pass of what it returns, the update.

    `blocks` are the modules that allocations are told apart by, with their names; `held` are tensors that are alive all
    along besides weights, such as a micro-batch on its device, and `held_bytes` what else is.
    """

    model: nn.Module
    optimizer: Optimizer
    forward: Callable[[], Any]
    backward: Callable[[Any], None]
    update: Callable[[], object]
    accumulated: bool
    blocks: Mapping[nn.Module, str]
    held: tuple[Tensor, ...] = ()
    held_bytes: int = 0


class Update(NamedTuple):
    """What is held before and after a step, what at the peak of an update beside gradients, and how long that takes."""

    weight_bytes: int
    held_bytes: int
    peak_bytes: int
    seconds: float


def trace_step(run: Run) -> Recording:
    """Return what a step allocates and releases: the second one, which finds the optimizer's states; both are marked.

    Weights and buffers are allocated before the first, which is an update from gradients that nobody computed.
    Raises InputError, naming operation and module, where the step reads numbers.
    """
    unused: set[nn.Parameter] = set()
    while True:
        recording, found = _trace(run, unused)
        if found <= unused:
            return recording
        # Parameters that the loss does not depend on get no gradient, and the optimizer keeps nothing of them.
        run.optimizer.state.clear()
        unused |= found


def trace_update(run: Run, clock: Clock | None = None) -> Update:
    """Return what an update holds if every parameter that may have a gradient has one."""
    recording = Recording()
    counting = Counting(True, recording, clock=clock)
    with counting.running():
        _hold_weights(run, counting)
        weight_bytes = counting.live
        for name in (FIRST_STEP, SECOND_STEP):
            held_bytes, began = counting.live, len(counting.timeline)
            recording.mark(name)
            _give_gradients(run, set())
            seconds_of(clock)
            _update(run, counting)
    return Update(weight_bytes, held_bytes, max(counting.timeline[began:]), seconds_of(clock))


def _trace(run: Run, unused: set[nn.Parameter]) -> tuple[Recording, set[nn.Parameter]]:
    """Trace both steps; return also the parameters that had no gradient when the second was to be updated."""
    recording, places = Recording(), Places(run.blocks)
    counting = Counting(True, recording, places.now)
    with counting.running(), places.following():
        _hold_weights(run, counting)
        _hold(counting, "activations", run.held)
        if run.held_bytes:
            recording.allocate(run.held_bytes, "temporaries", "")
        recording.mark(FIRST_STEP)
        recording.phase = "update"
        _give_gradients(run, unused)
        _update(run, counting)
        recording.mark(SECOND_STEP)
        for _ in range(MICRO_BATCHES_TO_PEAK if run.accumulated else 1):
            _micro_batch(run, counting, recording)
        without = {p for p in run.model.parameters() if p.requires_grad and p.grad is None}
        recording.phase = "update"
        _update(run, counting)
    return recording, without


def _give_gradients(run: Run, unused: set[nn.Parameter]) -> None:
    for parameter in run.model.parameters():
        if parameter.requires_grad and parameter not in unused:
            parameter.grad = torch.empty_like(parameter, dtype=parameter.grad_dtype)


def _hold_weights(run: Run, counting: Counting) -> None:
    for name, tensor in chain(run.model.named_parameters(), run.model.named_buffers()):
        _hold(counting, "weights", [tensor], place_of(name, run.blocks.values()))


def _hold(counting: Counting, cause: str, tensors: Iterable[Tensor], place: str = "") -> None:
    held = list(tensors)
    for tensor in held:
        counting.see(tensor, new=True)
    counting.recorded_as(held, cause, place)


def _micro_batch(run: Run, counting: Counting, recording: Recording) -> None:
    """Run one forward and backward pass; what only lived during the forward pass were temporaries."""
    began = len(recording.sizes)

    def forward() -> Any:
        recording.phase = "forward"
        out = run.forward()
        released = {~event for event in recording.events if event < 0}
        for number in range(began, len(recording.sizes)):
            if number in released:
                recording.causes[number] = "temporaries"
        recording.phase = "backward"
        return out

    run.backward(forward())
    for name, parameter in run.model.named_parameters():
        if parameter.grad is not None:
            counting.recorded_as([parameter.grad], "gradients", place_of(name, run.blocks.values()))


def _update(run: Run, counting: Counting) -> None:
    run.update()
    for name, parameter in run.model.named_parameters():
        states = tensors_in(run.optimizer.state.get(parameter, {}))
        counting.recorded_as(states, "optimizer_state", place_of(name, run.blocks.values()))


class Places:
    """Which block runs now: going forward as its call tells, going back as autograd's node tells, by its number.

    Autograd numbers its nodes as they are made; those of a call are what lies between its begin and its end.
    """

    def __init__(self, blocks: Mapping[nn.Module, str]) -> None:
        self._blocks = blocks
        self._inside: list[str] = []
        self._starts: list[int] = []
        self._names: list[str] = []

    def now(self) -> str:
        """Return the name of the block that runs, or nothing outside of blocks."""
        node: Any = torch._C._current_autograd_node() if torch._C._current_graph_task_id() != -1 else None
        if node is None:
            return self._inside[-1] if self._inside else ""
        place = bisect_right(self._starts, node._sequence_nr()) - 1
        return self._names[place] if place >= 0 else ""

    @contextmanager
    def following(self) -> Iterator[None]:
        """Follow the blocks' calls inside."""
        handles = []
        for block in self._blocks:
            handles.append(block.register_forward_pre_hook(self._enter))
            handles.append(block.register_forward_hook(self._leave))
        try:
            yield
        finally:
            for handle in handles:
                handle.remove()

    def _enter(self, block: nn.Module, inputs: Any) -> None:
        self._inside.append(self._blocks[block])
        self._note()

    def _leave(self, block: nn.Module, inputs: Any, out: Any) -> None:
        self._inside.pop()
        self._note()

    def _note(self) -> None:
        self._starts.append(torch._C._autograd._get_sequence_nr())
        self._names.append(self._inside[-1] if self._inside else "")
