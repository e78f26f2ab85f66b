"""What the optimizer keeps of each parameter, on the device or with offload on the host, and what updates hold there.

No torch. States that are on the host visit the device for the update, so many elements at a time, the next while one is
updated: the same kernels, the same numbers.
"""

from __future__ import annotations

import math
from collections.abc import Mapping
from typing import NamedTuple

from bigtrain.amp.cost import master_weight_bytes
from bigtrain.config.model import ModelConfig
from bigtrain.config.schema import Recipe
from bigtrain.memory.layout import layout_of, local_shapes
from bigtrain.models.operations_cost import FLOAT
from bigtrain.optim import cost as optim_cost
from bigtrain.sharding.cost import Layout

STAGED_ELEMENTS = 2**22
"""Elements whose states visit the device at a time: 16 MiB of each fp32 state, which PCIe moves at its full rate."""

STAGES = 2
"""One is updated while the next arrives."""

Shape = tuple[int, ...]


class Moved(NamedTuple):
    """Bytes that cross the link between a device and its host in a step."""

    to_device_bytes: int
    to_host_bytes: int


def state_parts(recipe: Recipe, name: str, shape: Shape) -> list[tuple[int, str]]:
    """Return bytes and cause of each tensor that the optimizer keeps; the part that belongs to weights comes last."""
    section, kept = recipe.optimizer, recipe.amp.master_weights
    matrix = is_matrix(name, shape)
    parts = optim_cost.tensor_state_parts(section.name, section.state, kept, shape, matrix=matrix)
    remainders = 1 if master_weight_bytes(1, kept) else 0
    causes = ["optimizer_state"] * (len(parts) - remainders) + ["master_weights"] * remainders
    return list(zip(parts, causes, strict=True))


def update_bytes(recipe: Recipe, layout: Layout, name: str, shape: Shape, whole: Shape, device: str) -> int:
    """Return what the update of this rank's part of a parameter holds for a moment.

    Muon orthogonalises whole matrices, one on each rank at a time: a rank has its rows of all of these, fp32, and the
    whole of its own.
    """
    section, matrix, sharded = recipe.optimizer, is_matrix(name, shape), layout.shards > 1
    dealt = sharded and matrix and section.name == "muon"
    rows = FLOAT * layout.shards * math.prod(shape) if dealt else 0
    worked = whole if dealt else shape
    work = optim_cost.tensor_temporary_bytes(section.name, worked, matrix=matrix, sharded=sharded, device=device)
    return rows + work + _staged_bytes(recipe, layout, name, shape)


def host_bytes(recipe: Recipe, model: ModelConfig, world_size: int) -> int:
    """Return the pinned host memory that a rank's offload holds; 0 without."""
    layout = layout_of(recipe, world_size)
    shapes = local_shapes(recipe, model, world_size)
    return sum(sum(_on_host(recipe, layout, name, shape)) for name, shape in shapes.items())


def moved_bytes(recipe: Recipe, model: ModelConfig, world_size: int, accumulation_steps: int) -> Moved:
    """Return what a rank's offload moves in a step: states there and back, with `all` weights and gradients as well.

    Weights come for each forward and each backward pass; gradients of several micro-batches are added up on the host.
    """
    layout, steps = layout_of(recipe, world_size), accumulation_steps
    shapes = local_shapes(recipe, model, world_size)
    held = [_on_host(recipe, layout, name, shape) for name, shape in shapes.items()]
    states, weights, gradients = (sum(column) for column in zip(*held, strict=True))
    return Moved(states + 2 * steps * weights + gradients, states + weights + steps * gradients)


def _on_host(recipe: Recipe, layout: Layout, name: str, shape: Shape) -> tuple[int, int, int]:
    """Return the bytes on the host of a parameter's states with its masters, its weights, and its gradients."""
    if layout.offload == "none":
        return 0, 0, 0
    elements = math.prod(shape)
    states = sum(size for size, _ in state_parts(recipe, name, shape))
    masters = FLOAT * elements if recipe.amp.master_weights == "fp32" and layout.number_bytes < FLOAT else 0
    if not layout.streaming:
        return states + masters, 0, 0
    return states + masters, layout.number_bytes * elements, layout.reduce_bytes * elements


def _staged_bytes(recipe: Recipe, layout: Layout, name: str, shape: Shape) -> int:
    """Return what of a parameter visits the device at a time; whole where an update is not element by element."""
    size, elements = sum(_on_host(recipe, layout, name, shape)), math.prod(shape)
    if recipe.optimizer.name == "adamw" and elements > STAGED_ELEMENTS:
        size = size * STAGED_ELEMENTS // elements
    return STAGES * size


def matrices(shapes: Mapping[str, Shape]) -> list[int]:
    """Return the places of the blocks' matrices, which Muon orthogonalises."""
    return [place for place, (name, shape) in enumerate(shapes.items()) if is_matrix(name, shape)]


def is_matrix(name: str, shape: Shape) -> bool:
    """Tell whether Muon orthogonalises a parameter."""
    return name.startswith("blocks.") and len(shape) == 2
