"""How a recipe's model lies on its ranks, and what the first of them keeps of each parameter. No torch."""

from __future__ import annotations

from bigtrain.amp.cost import weight_bytes
from bigtrain.config.model import ModelConfig
from bigtrain.config.schema import Recipe
from bigtrain.config.tensor_parallel import data_ranks
from bigtrain.models.shape import parameter_shapes
from bigtrain.sharding.cost import Layout, local_shape


def layout_of(recipe: Recipe, world_size: int) -> Layout:
    """Return the layout of a recipe without `auto` on so many ranks; those that share products count as one."""
    return Layout.of(recipe, data_ranks(recipe, world_size), weight_bytes(1, recipe.amp.master_weights))


def local_shapes(recipe: Recipe, model: ModelConfig, world_size: int) -> dict[str, tuple[int, ...]]:
    """Return the shape of what the first of so many ranks keeps of each parameter, by name."""
    shards = 1 if data_ranks(recipe, world_size) == 1 else layout_of(recipe, world_size).shards
    return {name: local_shape(shape, shards) for name, shape in tensor_shapes(recipe, model).items()}


def tensor_shapes(recipe: Recipe, model: ModelConfig) -> dict[str, tuple[int, ...]]:
    """Return the shape of each parameter by name, of those that ranks share what each of them has."""
    return parameter_shapes(model, recipe.sharding.tensor_parallel)
