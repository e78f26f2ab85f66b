"""The bytes that a training step holds, without torch: the costs of all mechanisms along the order of a step."""

from __future__ import annotations

import math
import os
from collections.abc import Callable
from dataclasses import replace
from functools import partial
from pathlib import Path

from bigtrain.amp import cost as amp_cost
from bigtrain.config.model import ModelConfig
from bigtrain.config.schema import Recipe
from bigtrain.config.tensor_parallel import data_ranks
from bigtrain.ledger import Ledger, Storage, Value
from bigtrain.memory.allocator import Allocator
from bigtrain.memory.layout import layout_of, local_shapes, tensor_shapes
from bigtrain.memory.record import END, Events
from bigtrain.memory.report import CAUSES, MemoryReport
from bigtrain.memory.state import device_parts, matrices, update_bytes
from bigtrain.models.attention_cost import document_places
from bigtrain.models.cost import MicroBatch, ModelCost
from bigtrain.models.operations_cost import FLOAT, Numbers, Operations
from bigtrain.models.shape import loss_chunk_tokens
from bigtrain.optim import cost as optim_cost
from bigtrain.recompute.cost import run_block
from bigtrain.recompute.policy import resolve
from bigtrain.sharding.cost import Layout
from bigtrain.sharding.step_cost import Around, sharding_of

FIRST_STEP, SECOND_STEP = "first step", "second step"
"""Marks of a recording."""

MICRO_BATCHES_TO_PEAK = 3
"""The first finds no gradients yet, the last reduces or lets go of what stages 1 and 2 keep; those between are alike.

Elsewhere the last is like those between.
"""


def predict(
    recipe: Recipe,
    model: ModelConfig,
    *,
    device: str,
    slow_bf16: bool,
    world_size: int = 1,
    threads: int | None = None,
    workspace_bytes: int = 0,
) -> MemoryReport:
    """Return what a rank holds at the peak of a step of a recipe without `auto`, after the first.

    Rows count as full, as packing all but makes them; of the documents, the longest as long as a row. What a CPU's
    attention kernel holds for each thread counts for so many `threads`, without it for as many as torch starts here.
    On CUDA `workspace_bytes` are what the library of matrix products takes from the allocator at the first call of each
    thread, thus of forward and of backward, and what the allocator reserves is found by replaying two steps: the first
    leaves its segments to the second.
    """
    recording = Events() if device == "cuda" else None
    ledger = Ledger(recording)
    step = Step(
        recipe,
        model,
        ledger,
        device=device,
        slow_bf16=slow_bf16,
        world_size=world_size,
        threads=threads or torch_threads(),
        workspace_bytes=workspace_bytes,
    )
    if recording is None:
        step.run()
    else:
        step.run_twice(recording)
    held = ledger.causes_at_peak()
    reserved = None if recording is None else reserved_bytes(recording)
    return MemoryReport({cause: held.get(cause, 0) for cause in CAUSES}, reserved_bytes_peak=reserved)


def reserved_bytes(recording: Events) -> int:
    """Return the most that the caching allocator reserves in the second of two recorded steps."""
    allocator, second = Allocator(expandable=True), recording.marks[SECOND_STEP]
    allocator.run(recording.events[:second])
    allocator.reset_peaks()
    return allocator.run(recording.events[second:]).reserved_bytes_peak


def buffer_bytes(recipe: Recipe, model: ModelConfig, *, accumulated: bool, device: str, world_size: int = 1) -> int:
    """Return the bytes of the optimizer's work buffers, which it keeps from its first step on."""
    section, shapes = recipe.optimizer, local_shapes(recipe, model, world_size)
    layout = layout_of(recipe, world_size)
    accumulated = accumulated and layout.alone  # sharded gradients have the dtype of the weights
    narrow = recipe.amp.master_weights == "fp32" and layout.kept_bytes < FLOAT
    named = (section.name, section.state, recipe.amp.master_weights)
    sizes = (list(shapes.values()), matrices(shapes))
    return optim_cost.buffer_bytes(
        *named, *sizes, accumulated=accumulated, narrow=narrow, sharded=layout.shards > 1, device=device
    )


def micro_batch(recipe: Recipe, micro_batch_size: int) -> MicroBatch:
    """Return what a forward pass gets when every row is full."""
    length = recipe.data.sequence_length
    tokens = micro_batch_size * length
    documents = document_places(micro_batch_size, length, packed=recipe.data.packing)
    if recipe.train.objective == "clm":
        return MicroBatch(tokens, tokens, length, gathered=False, documents=documents)
    labels = micro_batch_size * max(1, round(recipe.train.masking_probability * length))
    gathered = 2 * labels < tokens
    pairs = micro_batch_size if recipe.train.objective == "mlm_nsp" else 0
    return MicroBatch(tokens, labels if gathered else tokens, length, gathered, pairs, documents)


def numbers(recipe: Recipe, *, accumulated: bool, slow_bf16: bool) -> Numbers:
    """Return the bytes of each kind of number at a recipe's precision."""
    low, kept = recipe.amp.precision != "fp32", recipe.amp.master_weights
    return Numbers(
        activation=2 if low else FLOAT,
        weight=amp_cost.weight_bytes(1, kept),
        gradient=amp_cost.gradient_bytes(1, kept, accumulated=accumulated),
        widened=recipe.amp.precision == "bf16" and slow_bf16,
    )


def step_numbers(recipe: Recipe, layout: Layout, *, slow_bf16: bool) -> Numbers:
    """Return the bytes of each kind of number in a step: parameters that are sent compute in numbers of their own."""
    found = numbers(recipe, accumulated=layout.accumulated, slow_bf16=slow_bf16)
    if layout.alone and layout.offload == "none":
        return found
    size = layout.number_bytes
    return replace(found, weight=size, gradient=FLOAT if layout.alone and layout.accumulated else size)


def torch_threads(processes: int = 1) -> int:
    """Return how many threads torch computes with in each of so many processes of this machine.

    OMP_NUM_THREADS says so, or there is one for each core that they may use.
    """
    written = os.environ.get("OMP_NUM_THREADS", "").partition(",")[0].strip()
    if written.isdigit():
        return max(1, int(written))
    allowed = os.sched_getaffinity(0) if hasattr(os, "sched_getaffinity") else range(os.cpu_count() or 1)
    siblings = [Path(f"/sys/devices/system/cpu/cpu{cpu}/topology/thread_siblings_list") for cpu in allowed]
    cores = {path.read_text() if path.is_file() else str(path) for path in siblings}
    return max(1, len(cores) // processes)


class Step:
    """A step of a plan on a ledger."""

    def __init__(
        self,
        recipe: Recipe,
        model: ModelConfig,
        ledger: Ledger,
        *,
        device: str,
        slow_bf16: bool,
        world_size: int = 1,
        threads: int = 1,
        workspace_bytes: int = 0,
    ) -> None:
        micro, share = recipe.train.micro_batch_size, recipe.train.global_batch_size // data_ranks(recipe, world_size)
        budget = recipe.memory.budget
        assert micro != "auto" and budget != "auto"
        self._recipe, self._model, self._ledger, self._device = recipe, model, ledger, device
        self._workspace_bytes = workspace_bytes
        self._accumulated, self._world_size = share > micro, world_size
        self._ahead = device == "cuda" and self._accumulated
        self._released = recipe.optimizer.gradient_release is True
        self._batch = micro_batch(recipe, micro)
        self._layout = layout = layout_of(recipe, world_size)
        self.streaming = layout.streaming and device != "cpu"
        self._micro_batches = min(-(-share // micro), MICRO_BATCHES_TO_PEAK - layout.resharding)
        self._numbers = step_numbers(recipe, layout, slow_bf16=slow_bf16)
        chunk = loss_chunk_tokens(model.padded_vocab_size, device, budget)
        train = recipe.train
        operations = Operations(ledger, self._numbers, device, threads, compiled=train.compile is True)
        self._cost = ModelCost(
            model, operations, chunk, train.dropout, train.attention_dropout, recipe.sharding.tensor_parallel
        )
        self._gradient_bytes = self._numbers.gradient if layout.alone else layout.kept_bytes
        self._policies = resolve(recipe.recompute.policy, model.num_hidden_layers)
        self._whole = tensor_shapes(recipe, model)
        self._shapes = local_shapes(recipe, model, world_size)
        self._sharding: Around = sharding_of(ledger, layout, self._whole, device=device)
        self._held: dict[str, list[Storage]] = {}
        """The optimizer's states by parameter, and its work buffers under no name."""
        self._gradients: dict[str, Storage] = {}
        self._fed: list[Storage] = []
        """The batch, which lies there until the next one does."""

    def run(self) -> None:
        """Hold the state, run the micro-batches and the update."""
        held = self._hold_all()
        self._run_step()
        del held

    def run_twice(self, recording: Events) -> None:
        """Run a first step, whose update makes the optimizer's states and buffers, and a second; note where it begins.

        The peak is the second's alone.
        """
        held = self._hold_weights()
        for mark in (FIRST_STEP, SECOND_STEP):
            recording.mark(mark)
            self._ledger.restart_peak()
            self._run_step(recording)
        recording.mark(END)
        del held

    def _hold_all(self) -> list[Storage]:
        """Hold what an earlier step has left; returns the weights."""
        held = self._hold_weights()
        self._hold_buffers()
        for name in self._shapes:
            self._hold_state(name)
        return held

    def _hold_weights(self) -> list[Storage]:
        held = []
        for name, shape in self._shapes.items() if not self.streaming else ():
            self._ledger.place = _place_of(name)
            held.append(self._ledger.hold(math.prod(shape) * self._layout.kept_bytes, "weights"))
        return held

    def _hold_buffers(self) -> None:
        size = buffer_bytes(
            self._recipe, self._model, accumulated=self._accumulated, device=self._device, world_size=self._world_size
        )
        before = self._cost.batch(self._batch) if self._ahead else []  # is let go of a micro-batch late
        self._held[""] = [self._ledger.hold(size, "temporaries"), *before]

    def _hold_state(self, name: str) -> None:
        """Hold what the optimizer keeps of a parameter on the device."""
        parts = device_parts(self._recipe, self._layout, name, self._shapes[name], self._device)
        self._ledger.place = _place_of(name)
        self._held[name] = [self._ledger.hold(size, cause) for size, cause in parts]

    def _run_step(self, recording: Events | None = None) -> None:
        for index in range(self._micro_batches):
            self._run_passes(recording, last=index == self._micro_batches - 1)
        self._enter(recording, "update")
        self._run_updates()
        self._fed = []

    def _run_passes(self, recording: Events | None = None, *, last: bool) -> None:
        self._enter(recording, "forward")
        self._fed = self._cost.batch(self._batch)
        self._sharding.enter(last=last)
        loss, gradient = self._cost.loss(self._batch, self._run_block)
        self._enter(recording, "backward")
        self._ledger.backward(loss, gradient, self._sharding.turn(self._ready))
        del loss, gradient
        self._sharding.finish()

    def _run_updates(self) -> None:
        for name in self._gradients:
            self._update(name)
        self._gradients.clear()

    def _enter(self, recording: Events | None, phase: str) -> None:
        self._ledger.place = ""
        if recording is not None:
            recording.phase = phase
        if self._workspace_bytes and phase != "update" and phase not in self._held:
            self._held[phase] = [self._ledger.hold(self._workspace_bytes, "temporaries")]

    def _run_block(self, index: int, forward: Callable[[Value], Value], value: Value) -> Value:
        self._ledger.place = f"blocks.{index}"
        run = partial(run_block, self._ledger, self._policies[index], forward)
        out = self._sharding.block(index, run, value)
        self._ledger.place = ""
        return out

    def _ready(self, name: str, gradient: Storage) -> None:
        """Keep a gradient, add it to the one that is there, or with gradient release use it and let it go."""
        if self._released:
            self._update(name)
        else:
            self._gradients.setdefault(name, gradient)

    def _update(self, name: str) -> None:
        """Hold what a parameter's norm and its update need, and in the first step what the optimizer keeps of it."""
        if "" not in self._held:
            self._hold_buffers()
        if name not in self._held:
            self._hold_state(name)
        shape = self._shapes[name]
        if self._gradient_bytes < FLOAT and (self._released or self._device == "cpu"):
            self._ledger.passing(min(math.prod(shape), optim_cost.NORM_CHUNK_ELEMENTS) * FLOAT)
        self._ledger.passing(update_bytes(self._recipe, self._layout, name, shape, self._whole[name], self._device))


def _place_of(name: str) -> str:
    """Return the block that a parameter is in, or nothing."""
    return ".".join(name.split(".")[:2]) if name.startswith("blocks.") else ""
