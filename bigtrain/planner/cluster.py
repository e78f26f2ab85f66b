"""How many ranks a plan is for, and how they lie on machines. No torch."""

from __future__ import annotations

from bigtrain.config.checks import batch_faults, node_counts, world_sizes
from bigtrain.config.schema import Recipe
from bigtrain.config.shape_checks import fault
from bigtrain.config.tensor_parallel import data_ranks, rank_faults
from bigtrain.errors import RecipeError

DEVICES_PER_NODE = 8
"""The most that `devices_per_node: auto` puts into one machine when a world size is given, as machines have them."""


def placed(recipe: Recipe, world_size: int | None, *, devices: int = 1) -> tuple[Recipe, int]:
    """Return the recipe with its machines and their devices as numbers, and the number of ranks.

    Of `least:most` nodes the least count: the fewer ranks share the state, the more each holds. A given world size
    decides the number of machines, which may be one of those; without it `auto` devices of each are so many as this one
    has. Raises RecipeError if it does not divide into machines, or the batch into ranks, for each number of machines.
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
        ranks, nodes = world_size, _numbered(nodes, world_size // devices)
    cluster = recipe.cluster.model_copy(update={"devices_per_node": devices, "nodes": nodes})
    placed = recipe.model_copy(update={"cluster": cluster})
    if faults := [*rank_faults(placed)]:
        raise RecipeError(*faults)
    if isinstance(nodes, str):
        placed = regrouped(placed, _fewest_ranks(placed), ranks)
    if faults := batch_faults(placed, world_sizes(placed)):
        hint = _what_would_do(recipe, ranks)
        raise RecipeError(*(one._replace(text=one.text + hint) for one in faults))
    return placed, ranks


def for_fewest_nodes(recipe: Recipe, world_size: int) -> Recipe:
    """Return a recipe that was placed on so many ranks as it is for the fewest nodes of `least:most`."""
    if not isinstance(recipe.cluster.nodes, str):
        return recipe
    return regrouped(recipe, world_size, _fewest_ranks(recipe))


def regrouped(recipe: Recipe, before: int, ranks: int) -> Recipe:
    """Return a recipe for so many ranks in place of those before, no rank of which holds more with more of them.

    Where all share one model, they still do. Of several groups each stays as large, and there are more of them; where
    that does not divide, all share one.
    """
    stage, replicate = recipe.sharding.zero_stage, recipe.sharding.replicate
    if before == ranks or stage == "auto" or replicate == "auto":
        return recipe
    readers, group = data_ranks(recipe, ranks), max(1, data_ranks(recipe, before) // replicate)
    together = replicate == 1 or readers % group
    groups = readers if stage == 0 else 1 if together else readers // group
    return recipe.model_copy(update={"sharding": recipe.sharding.model_copy(update={"replicate": groups})})


def _fewest_ranks(recipe: Recipe) -> int:
    devices = recipe.cluster.devices_per_node
    assert devices != "auto"
    return devices * node_counts(recipe.cluster.nodes)[0]


def _numbered(nodes: int | str, count: int) -> int | str:
    """Return `least:most` where that allows so many, and else their number."""
    return nodes if isinstance(nodes, str) and count in node_counts(nodes) else count


def _what_would_do(recipe: Recipe, ranks: int) -> str:
    """Return the global batch or the number of ranks to write where ranks would have no row at all, else nothing."""
    rows, micro = recipe.train.global_batch_size, recipe.train.micro_batch_size
    share = ranks if micro == "auto" else ranks * micro
    if rows >= share:
        return ""
    return f"; write train.global_batch_size={share}, or use at most {rows * ranks // share} ranks"


def _most_per_node(world_size: int) -> int:
    return next(size for size in range(min(DEVICES_PER_NODE, world_size), 0, -1) if world_size % size == 0)
