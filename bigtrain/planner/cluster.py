"""How many ranks a plan is for, and how they lie on machines. No torch."""

from __future__ import annotations

from bigtrain.config.checks import batch_faults
from bigtrain.config.schema import Recipe
from bigtrain.config.shape_checks import fault
from bigtrain.errors import RecipeError

DEVICES_PER_NODE = 8
"""The most that `devices_per_node: auto` puts into one machine when a world size is given, as machines have them."""


def placed(recipe: Recipe, world_size: int | None, *, devices: int = 1) -> tuple[Recipe, int]:
    """Return the recipe with its machines and their devices as numbers, and the number of ranks.

    Of `least:most` nodes the least count: the fewer ranks share the state, the more each holds. A given world size
    decides the number of machines; without it `auto` devices of each are so many as this one has. Raises RecipeError if it does not divide into machines, or the batch into ranks.
    """
    written, nodes = recipe.cluster.devices_per_node, recipe.cluster.nodes
    if world_size is None:
        devices = devices if written == "auto" else written
        ranks = devices * int(str(nodes).partition(":")[0])
    else:
        devices = _most_per_node(world_size) if written == "auto" else written
        if world_size % devices:
            text = f"{devices} devices a machine do not divide a world size of {world_size}"
            use = f"use a divisor, such as {_most_per_node(world_size)}, or auto"
            raise RecipeError(fault(recipe, "cluster.devices_per_node", f"{text}; {use}"))
        ranks, nodes = world_size, world_size // devices
    cluster = recipe.cluster.model_copy(update={"devices_per_node": devices, "nodes": nodes})
    placed = recipe.model_copy(update={"cluster": cluster})
    if faults := batch_faults(placed, [ranks]):
        hint = _what_would_do(recipe, ranks)
        raise RecipeError(*(one._replace(text=one.text + hint) for one in faults))
    return placed, ranks


def _what_would_do(recipe: Recipe, ranks: int) -> str:
    """Return the global batch or the number of ranks to write where ranks would have no row at all, else nothing."""
    rows, micro = recipe.train.global_batch_size, recipe.train.micro_batch_size
    share = ranks if micro == "auto" else ranks * micro
    if rows >= share:
        return ""
    return f"; write train.global_batch_size={share}, or use at most {rows * ranks // share} ranks"


def _most_per_node(world_size: int) -> int:
    return next(size for size in range(min(DEVICES_PER_NODE, world_size), 0, -1) if world_size % size == 0)
