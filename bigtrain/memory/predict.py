"""The bytes that a training step holds, without torch: the costs of all mechanisms along the order of a step."""

from __future__ import annotations

import math
import os
from collections.abc import Callable, Mapping
from pathlib import Path

from bigtrain.amp import cost as amp_cost
from bigtrain.config.model import ModelConfig
from bigtrain.config.schema import Recipe
from bigtrain.ledger import Ledger, Storage, Value
from bigtrain.memory.report import CAUSES, MemoryReport
from bigtrain.models.cost import MicroBatch, ModelCost
from bigtrain.models.operations_cost import FLOAT, Numbers, Operations
from bigtrain.models.shape import loss_chunk_tokens, parameter_shapes, stored_parameters
from bigtrain.optim import cost as optim_cost
from bigtrain.recompute.cost import run_block
from bigtrain.recompute.policy import resolve

MICRO_BATCHES_TO_PEAK = 2
"""The first finds no gradients yet; the later ones are all alike."""


def predict(
    recipe: Recipe,
    model: ModelConfig,
    *,
    device: str,
    slow_bf16: bool,
    world_size: int = 1,
    threads: int | None = None,
) -> MemoryReport:
    """Return what a rank holds at the peak of a step of a recipe without `auto`, after the first.

    Rows count as full, as packing all but makes them; of the documents, the longest as long as a row. What a CPU's
    attention kernel holds for each thread counts for so many `threads`, without it for as many as torch starts here.
    """
    ledger = Ledger()
    Step(
        recipe,
        model,
        ledger,
        device=device,
        slow_bf16=slow_bf16,
        world_size=world_size,
        threads=threads or torch_threads(),
    ).run()
    held = ledger.causes_at_peak()
    return MemoryReport({cause: held.get(cause, 0) for cause in CAUSES})


def model_state(recipe: Recipe, model: ModelConfig, *, accumulated: bool) -> dict[str, int]:
    """Return the bytes of model state by cause: exactly what weights, gradients and the optimizer's states are."""
    parameters, kept = stored_parameters(model), recipe.amp.master_weights
    remainder = amp_cost.master_weight_bytes(parameters, kept)
    released = recipe.optimizer.gradient_release
    return {
        "weights": amp_cost.weight_bytes(parameters, kept),
        "master_weights": remainder,
        "gradients": 0 if released else amp_cost.gradient_bytes(parameters, kept, accumulated=accumulated),
        "optimizer_state": _optimizer_bytes(recipe, model) - remainder,
    }


def buffer_bytes(recipe: Recipe, model: ModelConfig, *, accumulated: bool, device: str) -> int:
    """Return the bytes of the optimizer's work buffers, which it keeps from its first step on."""
    section, shapes = recipe.optimizer, parameter_shapes(model)
    return optim_cost.buffer_bytes(
        section.name,
        section.state,
        recipe.amp.master_weights,
        list(shapes.values()),
        _matrices(shapes),
        accumulated=accumulated,
        device=device,
    )


def micro_batch(recipe: Recipe, micro_batch_size: int) -> MicroBatch:
    """Return what a forward pass gets when every row is full."""
    length = recipe.data.sequence_length
    tokens = micro_batch_size * length
    if recipe.train.objective == "clm":
        return MicroBatch(tokens, tokens, length, gathered=False)
    labels = micro_batch_size * max(1, round(recipe.train.masking_probability * length))
    gathered = 2 * labels < tokens
    return MicroBatch(tokens, labels if gathered else tokens, length, gathered)


def numbers(recipe: Recipe, *, accumulated: bool, slow_bf16: bool) -> Numbers:
    """Return the bytes of each kind of number at a recipe's precision."""
    low, kept = recipe.amp.precision != "fp32", recipe.amp.master_weights
    return Numbers(
        activation=2 if low else FLOAT,
        weight=amp_cost.weight_bytes(1, kept),
        gradient=amp_cost.gradient_bytes(1, kept, accumulated=accumulated),
        widened=recipe.amp.precision == "bf16" and slow_bf16,
    )


def torch_threads() -> int:
    """Return how many threads torch computes with here: OMP_NUM_THREADS, or one for each core that it may use."""
    written = os.environ.get("OMP_NUM_THREADS", "").partition(",")[0].strip()
    if written.isdigit():
        return max(1, int(written))
    allowed = os.sched_getaffinity(0) if hasattr(os, "sched_getaffinity") else range(os.cpu_count() or 1)
    siblings = [Path(f"/sys/devices/system/cpu/cpu{cpu}/topology/thread_siblings_list") for cpu in allowed]
    cores = {path.read_text() if path.is_file() else str(path) for path in siblings}
    return len(cores)


class Step:
    """One step of a plan on a ledger."""

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
    ) -> None:
        micro, share = recipe.train.micro_batch_size, recipe.train.global_batch_size // world_size
        budget = recipe.memory.budget
        assert micro != "auto" and budget != "auto"
        self._recipe, self._model, self._ledger, self._device = recipe, model, ledger, device
        self._accumulated = share > micro
        self._released = recipe.optimizer.gradient_release is True
        self._batch = micro_batch(recipe, micro)
        self._numbers = numbers(recipe, accumulated=self._accumulated, slow_bf16=slow_bf16)
        chunk = loss_chunk_tokens(model.padded_vocab_size, device, budget)
        operations = Operations(ledger, self._numbers, device, threads)
        train = recipe.train
        self._cost = ModelCost(model, operations, chunk, train.dropout, train.attention_dropout)
        self._policies = resolve(recipe.recompute.policy, model.num_hidden_layers)
        self._shapes = parameter_shapes(model)
        self._gradients: dict[str, Storage] = {}

    def run(self) -> None:
        """Hold the state, run the micro-batches and the update."""
        state = model_state(self._recipe, self._model, accumulated=self._accumulated)
        held = [self._ledger.hold(size, cause) for cause, size in state.items() if cause != "gradients"]
        buffers = buffer_bytes(self._recipe, self._model, accumulated=self._accumulated, device=self._device)
        held.append(self._ledger.hold(buffers, "temporaries"))
        batch: list[Storage] = []
        for _ in range(MICRO_BATCHES_TO_PEAK if self._accumulated else 1):
            batch = self._cost.batch(self._batch)
            loss, gradient = self._cost.loss(self._batch, self._run_block)
            self._ledger.backward(loss, gradient, self._ready)
            del loss, gradient
        for name in self._gradients:
            self._update(name)
        self._gradients.clear()
        del held, batch

    def _run_block(self, index: int, forward: Callable[[Value], Value], value: Value) -> Value:
        return run_block(self._ledger, self._policies[index], forward, value)

    def _ready(self, name: str, gradient: Storage) -> None:
        """Keep a gradient, add it to the one that is there, or with gradient release use it and let it go."""
        if self._released:
            self._update(name)
        else:
            self._gradients.setdefault(name, gradient)

    def _update(self, name: str) -> None:
        """Hold what a parameter's norm and its update need."""
        section, shape = self._recipe.optimizer, self._shapes[name]
        if self._numbers.gradient < FLOAT:
            self._ledger.passing(self._norm_elements(math.prod(shape)) * FLOAT)
        matrix = _is_matrix(name, shape)
        self._ledger.passing(optim_cost.tensor_temporary_bytes(section.name, shape, matrix=matrix, device=self._device))

    def _norm_elements(self, elements: int) -> int:
        """Return how many elements of a low-precision gradient are converted at a time for its norm."""
        chunked = self._released or self._device == "cpu"
        return min(elements, optim_cost.NORM_CHUNK_ELEMENTS) if chunked else 0


def _optimizer_bytes(recipe: Recipe, model: ModelConfig) -> int:
    shapes = parameter_shapes(model)
    section, weights = recipe.optimizer, recipe.amp.master_weights
    return optim_cost.optimizer_state_bytes(section.name, section.state, weights, shapes.values(), _matrices(shapes))


def _matrices(shapes: Mapping[str, tuple[int, ...]]) -> list[int]:
    """Return the places of the blocks' matrices, which Muon orthogonalises."""
    return [place for place, (name, shape) in enumerate(shapes.items()) if _is_matrix(name, shape)]


def _is_matrix(name: str, shape: tuple[int, ...]) -> bool:
    return name.startswith("blocks.") and len(shape) == 2
