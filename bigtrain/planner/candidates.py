"""Every way to run a recipe that it leaves open: what it says `auto` for is tried, what it says stays. No torch.

A *setting* is a choice without the blocks' recompute policies (`recompute` is empty); a *mix* is those alone.
"""

from __future__ import annotations

import math
from collections.abc import Iterator, Sequence
from itertools import product

from bigtrain.amp import rules
from bigtrain.config.checks import node_counts
from bigtrain.config.schema import Recipe
from bigtrain.config.tensor_parallel import data_ranks
from bigtrain.memory.compose import Runs, runs_of
from bigtrain.optim.cost import MASTER_WEIGHTS, releasable, supported_states
from bigtrain.planner.choice import Choice
from bigtrain.planner.hardware import Hardware
from bigtrain.planner.mechanisms import release_obstacles
from bigtrain.recompute.policy import resolve

STAGES = (0, 1, 2, 3)
OFFLOADS = ("none", "optimizer", "all")
"""What is tried for `sharding.offload: auto`; NVMe is for who asks for it."""


def settings(recipe: Recipe, hardware: Hardware, world_size: int) -> list[Choice]:
    """Return every setting that a recipe leaves open, for so many ranks, which must share its global batch evenly."""
    ranks = data_ranks(recipe, world_size)
    rows = recipe.train.global_batch_size // ranks
    micro = recipe.train.micro_batch_size
    found = []
    for micro_batch_size in [micro] if micro != "auto" else divisors(_rows_at_any(recipe, rows)):
        steps = rows // micro_batch_size
        for (stage, replicate), release in product(_layouts(recipe, hardware, ranks), _releases(recipe, steps)):
            if release and not releasable(recipe.optimizer.name, sharded=stage > 0 and replicate < ranks):
                continue
            for offload, state, kept in product(_offloads(recipe, hardware), _states(recipe), _master_weights(recipe)):
                found.append(Choice(micro_batch_size, steps, (), stage, replicate, offload, state, release, kept))
    return found


def _rows_at_any(recipe: Recipe, rows: int) -> int:
    """Return what divides a rank's rows at each number of nodes that the recipe allows."""
    devices, nodes = recipe.cluster.devices_per_node, recipe.cluster.nodes
    if devices == "auto" or not isinstance(nodes, str):
        return rows
    total = recipe.train.global_batch_size
    return math.gcd(*(total // data_ranks(recipe, count * devices) for count in node_counts(nodes)))


def divisors(number: int) -> list[int]:
    """Return the divisors of a number, rising."""
    low = [size for size in range(1, int(number**0.5) + 1) if number % size == 0]
    return low + [number // size for size in reversed(low) if size * size != number]


def mixes(recipe: Recipe, blocks: int, hardware: Hardware, *, offload: bool = False) -> list[list[Runs]]:
    """Return the mixes of policies that a recipe leaves open, in rows; a row's later ones compute more again.

    Blocks that keep more come last: what they keep lives shortest there. Each row has so many blocks under `full`, none
    in the first, or with `offload` under that. The very first mix computes the least again.
    """
    policy = recipe.recompute.policy
    if policy != "auto":
        return [[runs_of(resolve(policy, blocks))]]
    most = "offload" if offload else "full"
    selective = range(blocks + 1) if _selective(recipe, hardware) else range(1)
    return [
        [
            _runs((most, whole), ("selective", part), ("none", blocks - whole - part))
            for part in selective
            if whole + part <= blocks
        ]
        for whole in range(blocks + 1)
    ]


def policies(runs: Runs) -> tuple[str, ...]:
    """Return one policy for each block."""
    return tuple(policy for policy, count in runs for _ in range(count))


def _runs(*runs: tuple[str, int]) -> Runs:
    return tuple(run for run in runs if run[1])


def _selective(recipe: Recipe, hardware: Hardware) -> bool:
    """Return whether selective recomputation works here: compiled code on a CPU does not show its products."""
    return not (hardware.kind == "cpu" and recipe.train.compile is True)


def _releases(recipe: Recipe, accumulation_steps: int) -> Sequence[bool]:
    possible = not list(release_obstacles(recipe, accumulation_steps))
    written = recipe.optimizer.gradient_release
    if written == "auto":
        return (False, True) if possible else (False,)
    return (written,) if possible or not written else ()


def _states(recipe: Recipe) -> Sequence[str]:
    written = recipe.optimizer.state
    return supported_states(recipe.optimizer.name) if written == "auto" else (written,)


def _master_weights(recipe: Recipe) -> Sequence[str]:
    written, precision = recipe.amp.master_weights, recipe.amp.precision
    if written != "auto":
        return (written,)
    rate, size = recipe.optimizer.learning_rate, recipe.model.initializer_range
    possible = [kept for kept in MASTER_WEIGHTS if rules.master_weights_fault(precision, kept) is None]
    return [kept for kept in possible if rules.slow_rate_warning(rate, size, kept) is None]


def _offloads(recipe: Recipe, hardware: Hardware) -> Sequence[str]:
    written = recipe.sharding.offload
    if written != "auto":
        return (written,)
    possible = hardware.kind == "cuda" and recipe.sharding.tensor_parallel == 1
    return [place for place in OFFLOADS if place == "none" or possible]


def _layouts(recipe: Recipe, hardware: Hardware, world_size: int) -> Iterator[tuple[int, int]]:
    """Yield stages with their groups; at stage 0, and where each rank is a group, nothing is sharded.

    Ranks that share products count as one here.
    """
    stage, replicate = recipe.sharding.zero_stage, recipe.sharding.replicate
    deepspeed = recipe.sharding.engine == "deepspeed"
    for tried in STAGES[deepspeed:] if stage == "auto" else (stage,):
        if replicate != "auto":
            if deepspeed or stage != "auto" or (replicate < world_size) == (tried > 0):
                yield tried, replicate
        elif world_size == 1 or tried == 0:
            if tried == 0 or stage != "auto":
                yield tried, world_size
        else:
            node = max(1, devices_of_a_node(recipe, hardware) // recipe.sharding.tensor_parallel)
            for ranks in shard_groups(world_size, node):
                yield tried, world_size // ranks


def devices_of_a_node(recipe: Recipe, hardware: Hardware) -> int:
    """Return how many devices a machine has: as written, those here, or those that the table's link reaches."""
    written = recipe.cluster.devices_per_node
    if written != "auto":
        return written
    return max(hardware.devices, hardware.device.peer_devices if hardware.device is not None else 1)


def shard_groups(world_size: int, node: int) -> list[int]:
    """Return how many ranks may share a model: parts of a node, a node, and doubling numbers of nodes, up to all."""
    sizes = {size for size in divisors(node) if world_size % size == 0}
    while node < world_size:
        sizes |= {node} if world_size % node == 0 else set()
        node *= 2
    return sorted({*sizes, world_size} - {1})
