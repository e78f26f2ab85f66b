"""Ranks that share each product: what must divide by their number, what they cannot go with, and who reads rows."""

from __future__ import annotations

import math
from collections.abc import Iterator

from bigtrain.config.keys import listed
from bigtrain.config.model import ModelConfig
from bigtrain.config.schema import Recipe
from bigtrain.config.shape_checks import fault, nearest_divisors
from bigtrain.errors import Fault

KEY = "sharding.tensor_parallel"

CUT = ("num_attention_heads", "num_key_value_heads", "intermediate_size")
"""Of what each rank has a part."""


def data_ranks(recipe: Recipe, world_size: int) -> int:
    """Return how many of so many ranks read rows of their own: those that share products read the same ones."""
    return max(1, world_size // recipe.sharding.tensor_parallel)


def tensor_faults(recipe: Recipe, shape: ModelConfig) -> Iterator[Fault]:
    """Yield what keeps ranks from sharing the products of a shape as the recipe says."""
    ranks = recipe.sharding.tensor_parallel
    if ranks == 1:
        return
    sizes = {key: getattr(shape, key) for key in CUT}
    if uneven := [f"model.{key}, {size}" for key, size in sizes.items() if size % ranks]:
        near = nearest_divisors(math.gcd(*sizes.values()), ranks)
        text = f"{ranks} does not divide {listed(uneven, 'and')}; nearest that do all: {near}"
        yield fault(recipe, KEY, text, *(f"model.{key}" for key in CUT))
    for key, found, allowed, why in _contradictions(recipe):
        if found not in allowed:
            text = f"{ranks} with {key}={found}: {why}; use {key}={allowed[0]}, or {KEY}=1"
            yield fault(recipe, KEY, text, key)


def _contradictions(recipe: Recipe) -> Iterator[tuple[str, object, tuple[object, ...], str]]:
    """Yield keys with their value, those that go with shared products, and why others do not."""
    yield (
        "train.attention_dropout",
        recipe.train.attention_dropout,
        (0.0,),
        "ranks draw the same random numbers, and would drop the same of different heads",
    )
    yield (
        "optimizer.name",
        recipe.optimizer.name,
        ("adamw",),
        "its update needs whole matrices, and ranks have parts of their columns too",
    )
    yield "amp.precision", recipe.amp.precision, ("bf16", "fp32", "fp16"), "a rank would scale its part by itself"
    yield "sharding.offload", recipe.sharding.offload, ("none", "auto"), "neither was tried with the other"


def rank_faults(recipe: Recipe) -> Iterator[Fault]:
    """Yield what is wrong with the number of ranks where the recipe says how many a machine has."""
    ranks, devices = recipe.sharding.tensor_parallel, recipe.cluster.devices_per_node
    if devices != "auto" and devices % ranks:
        near = nearest_divisors(devices, ranks)
        text = f"{ranks} does not divide the {devices} ranks of a machine, inside of which products are shared"
        text += f"; nearest that do: {near}; or use cluster.devices_per_node={-(-devices // ranks) * ranks}"
        yield fault(recipe, KEY, text, "cluster.devices_per_node")
