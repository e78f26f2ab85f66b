"""What the optimizer keeps of each parameter, on the device or with offload on the host, and what updates hold there.

No torch. States that are on the host visit the device for the update, a piece at a time, the next while one is updated:
the same kernels on the same pieces, the same numbers.
"""

from __future__ import annotations

import math
from collections import Counter
from collections.abc import Mapping
from typing import NamedTuple

from bigtrain.amp.cost import master_weight_bytes, weight_bytes
from bigtrain.config.model import ModelConfig
from bigtrain.config.schema import Recipe
from bigtrain.memory.layout import layout_of, local_shapes
from bigtrain.models.operations_cost import FLOAT
from bigtrain.models.shape import parameter_shapes
from bigtrain.optim import cost as optim_cost
from bigtrain.sharding.cost import Layout

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


def device_parts(recipe: Recipe, layout: Layout, name: str, shape: Shape, device: str) -> list[tuple[int, str]]:
    """Return those that are on the device: with offload step counts and Adafactor's rows and columns alone.

    On the CPU the host's memory is the device's, so that all are, fp32 masters of narrower weights last.
    """
    parts = state_parts(recipe, name, shape)
    if layout.offload == "none":
        return parts
    if device == "cpu":
        masters = _master_bytes(recipe, layout, shape)
        return [*parts, (masters, "master_weights")] if masters else parts
    if recipe.optimizer.name == "adafactor":
        return [part for part in parts if part[1] == "optimizer_state"]
    return parts[:1]


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
    return rows + work + _staged_bytes(recipe, layout, name, shape, device)


def model_state(
    recipe: Recipe, model: ModelConfig, *, accumulated: bool, device: str = "cuda", world_size: int = 1
) -> dict[str, int]:
    """Return the bytes of model state by cause: exactly what a rank's weights, gradients and optimizer states are.

    What is offloaded counts on the CPU alone, where the host's memory is the device's.
    """
    layout = layout_of(recipe, world_size)
    shapes = local_shapes(recipe, model, world_size)
    parameters = sum(math.prod(shape) for shape in shapes.values())
    gradient = FLOAT if accumulated and layout.alone else layout.kept_bytes
    states = {"master_weights": 0, "optimizer_state": 0}
    for name, shape in shapes.items():
        for size, cause in device_parts(recipe, layout, name, shape, device):
            states[cause] += size
    elsewhere = layout.streaming and device != "cpu"
    return {
        "weights": 0 if elsewhere else parameters * layout.kept_bytes,
        "master_weights": states["master_weights"],
        "gradients": 0 if elsewhere or recipe.optimizer.gradient_release else gradient * parameters,
        "optimizer_state": states["optimizer_state"],
    }


def host_bytes(recipe: Recipe, model: ModelConfig, world_size: int) -> int:
    """Return the pinned host memory that a rank's offload holds; 0 without.

    Buffers have exactly the size of what is in them, but for gradients: those are in torch's own pinned memory, which
    rounds each up to a power of two.
    """
    layout = layout_of(recipe, world_size)
    held = [_on_host(recipe, layout, *parameter) for parameter in local_shapes(recipe, model, world_size).items()]
    return sum(sum(hosted[:-1]) + _power_of_two(hosted.gradients) for hosted in held)


def saved_bytes(recipe: Recipe, model: ModelConfig, world_size: int = 1) -> int:
    """Return what the first of so many ranks writes of parameters and optimizer states into a checkpoint.

    Of one rank it is the whole checkpoint, whatever ranks write it: weights in fp32 where those are kept anywhere.
    """
    shapes = parameter_shapes(model) if world_size == 1 else local_shapes(recipe, model, world_size)
    width = max(weight_bytes(1, recipe.amp.master_weights), layout_of(recipe, world_size).kept_bytes)
    return sum(
        width * math.prod(shape) + sum(size for size, _ in state_parts(recipe, name, shape))
        for name, shape in shapes.items()
    )


def _power_of_two(size: int) -> int:
    return 1 << (size - 1).bit_length() if size else 0


def moved_bytes(recipe: Recipe, model: ModelConfig, world_size: int, accumulation_steps: int) -> Moved:
    """Return what a rank's offload moves in a step: for the update, and with `all` for passes and gradients as well.

    An update sends what it changes and reads everything once, but for LAMB, which goes through a parameter twice, and
    Adafactor, which reads gradients three times. With `all`, whatever is gathered comes from the host; gradients leave
    whenever they are reduced.
    """
    layout, to_device, to_host = layout_of(recipe, world_size), 0, 0
    for (name, shape), count in _alike(recipe, model, world_size).items():
        moved = _moved(recipe, layout, name, shape, accumulation_steps)
        to_device, to_host = to_device + count * moved.to_device_bytes, to_host + count * moved.to_host_bytes
    return Moved(to_device, to_host)


def gathered_bytes(recipe: Recipe, model: ModelConfig, world_size: int, accumulation_steps: int) -> int:
    """Return how much of that comes to the device for forward and backward passes, beside which they may compute."""
    layout = layout_of(recipe, world_size)
    return sum(
        count * _gathers(layout, name, accumulation_steps) * _on_host(recipe, layout, name, shape).weights
        for (name, shape), count in _alike(recipe, model, world_size).items()
    )


def _alike(recipe: Recipe, model: ModelConfig, world_size: int) -> Counter[tuple[str, Shape]]:
    """Return how many parameters there are of each shape, in blocks and outside: a name tells no more here."""
    shapes = local_shapes(recipe, model, world_size).items()
    return Counter(("blocks." if name.startswith("blocks.") else "", shape) for name, shape in shapes)


def _gathers(layout: Layout, name: str, accumulation_steps: int) -> int:
    """Return how often a parameter is gathered in a step; what is outside of the blocks stays for both passes."""
    if not layout.resharding:
        return 1
    return accumulation_steps * (2 if name.startswith("blocks.") else 1)


def _moved(recipe: Recipe, layout: Layout, name: str, shape: Shape, accumulation_steps: int) -> Moved:
    """Return what one parameter moves."""
    hosted = _on_host(recipe, layout, name, shape)
    passes = 2 if recipe.optimizer.name == "lamb" else 1
    reads = 3 if recipe.optimizer.name == "adafactor" else 1
    fetched = passes * (hosted.moments + hosted.weight_states + hosted.weights) + reads * hosted.gradients
    gathers = _gathers(layout, name, accumulation_steps)
    reductions = 1 if layout.zero_stage == 1 or len(layout.mesh) == 2 else accumulation_steps
    return Moved(
        fetched + gathers * hosted.weights,
        hosted.moments + hosted.weight_states + hosted.weights + reductions * hosted.gradients,
    )


class Hosted(NamedTuple):
    """Bytes of a parameter on the host; `weight_states` are the remainder, or the fp32 master of a narrower weight."""

    moments: int
    weight_states: int
    weights: int
    gradients: int


def _on_host(recipe: Recipe, layout: Layout, name: str, shape: Shape) -> Hosted:
    """Return what is on the host of a parameter, wherever the device's memory is."""
    if layout.offload == "none":
        return Hosted(0, 0, 0, 0)
    parts = state_parts(recipe, name, shape)
    remainder = sum(size for size, cause in parts if cause == "master_weights")
    moments = 0 if recipe.optimizer.name == "adafactor" else sum(size for size, _ in parts[1:]) - remainder
    kept = layout.kept_bytes * math.prod(shape) if layout.streaming else 0
    return Hosted(moments, remainder + _master_bytes(recipe, layout, shape), kept, kept)


def _master_bytes(recipe: Recipe, layout: Layout, shape: Shape) -> int:
    """Return the bytes of fp32 masters beside weights that are kept narrower than they are without offload."""
    apart = recipe.amp.master_weights == "fp32" and layout.kept_bytes < FLOAT
    return FLOAT * math.prod(shape) if apart else 0


def _staged_bytes(recipe: Recipe, layout: Layout, name: str, shape: Shape, device: str) -> int:
    """Return what visits of a parameter's pieces take on the device."""
    elements = math.prod(shape)
    if layout.offload == "none" or not elements:
        return 0
    if recipe.optimizer.name == "adafactor":
        piece = optim_cost.row_piece(device, shape)
    else:
        piece = min(optim_cost.PIECE_ELEMENTS[device], elements)
    hosted = _on_host(recipe, layout, name, shape)
    sizes = [piece * layout.kept_bytes] * (2 if layout.streaming else 0)
    if hosted.weight_states:
        sizes.append(piece * (hosted.weight_states // elements))
    if hosted.moments:
        section, matrix = recipe.optimizer, is_matrix(name, shape)
        whole = optim_cost.tensor_state_parts(section.name, section.state, "fp32", shape, matrix=matrix)[1:]
        sizes += [-(-size * piece // elements) for size in whole]
    return optim_cost.STAGES * optim_cost.staged_bytes(sizes)


def matrices(shapes: Mapping[str, Shape]) -> list[int]:
    """Return the places of the blocks' matrices, which Muon orthogonalises."""
    return [place for place, (name, shape) in enumerate(shapes.items()) if is_matrix(name, shape)]


def is_matrix(name: str, shape: Shape) -> bool:
    """Tell whether Muon orthogonalises a parameter."""
    return name.startswith("blocks.") and len(shape) == 2
