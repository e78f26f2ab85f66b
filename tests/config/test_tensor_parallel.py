"""What must fit together where ranks share products; each fault names its key, and what to do instead."""

from __future__ import annotations

from typing import Any

import pytest

from bigtrain.config.load import load_recipe
from bigtrain.config.schema import Recipe
from bigtrain.config.tensor_parallel import data_ranks
from bigtrain.errors import RecipeError

RECIPE = """
name: shared
model: {family: gpt, hidden_size: 96, num_hidden_layers: 2, num_attention_heads: 12, intermediate_size: 192}
data: {vocab_size: 500, sequence_length: 32}
train: {objective: clm, global_batch_size: 16, steps: 5}
optimizer: {learning_rate: 1e-3}
cluster: {devices_per_node: 8}
"""


@pytest.fixture
def load(tmp_path: Any) -> Any:
    path = tmp_path / "r.yaml"
    path.write_text(RECIPE)

    def loaded(*overrides: str) -> Recipe:
        return load_recipe(path, list(overrides))

    return loaded


def texts(error: pytest.ExceptionInfo[RecipeError]) -> str:
    return "\n".join(f"{fault.key}: {fault.text}" for fault in error.value.faults)


@pytest.mark.parametrize(("ranks", "world", "readers"), [(1, 8, 8), (2, 8, 4), (4, 4, 1)])
def test_those_that_share_products_read_the_same_rows(load: Any, ranks: int, world: int, readers: int) -> None:
    assert data_ranks(load(f"sharding.tensor_parallel={ranks}"), world) == readers


@pytest.mark.parametrize(
    ("overrides", "told"),
    [
        (
            ["model.num_attention_heads=6"],
            r"4 does not divide model.num_attention_heads, 6",
        ),
        (["model.intermediate_size=190"], r"4 does not divide model.intermediate_size, 190; nearest that do all: 2"),
        (["cluster.devices_per_node=6"], r"4 does not divide the 6 ranks of a machine.*do: 3, 6.*devices_per_node=8"),
        (["train.attention_dropout=0.1"], r"4 with train.attention_dropout=0.1: .*; use train.attention_dropout=0.0"),
        (["optimizer.name=lamb"], r"4 with optimizer.name=lamb: .*; use optimizer.name=adamw, or .*parallel=1"),
        (["amp.precision=fp8"], r"4 with amp.precision=fp8: .*; use amp.precision=bf16"),
        (["sharding.offload=optimizer"], r"4 with sharding.offload=optimizer: .*; use sharding.offload=none"),
    ],
    ids=lambda value: value[0] if isinstance(value, list) else "",
)
def test_what_ranks_cannot_share(load: Any, overrides: list[str], told: str) -> None:
    with pytest.raises(RecipeError) as error:
        load("sharding.tensor_parallel=4", *overrides)
    assert "sharding.tensor_parallel: " in texts(error)
    error.match(told)
    load(*[one for one in overrides if "devices" not in one])


def test_groups_share_the_batch(load: Any) -> None:
    load("sharding.tensor_parallel=4", "train.global_batch_size=2")
    with pytest.raises(RecipeError, match=r"3 is not divisible by 2 groups of 4 ranks; nearest that are: 2, 4"):
        load("sharding.tensor_parallel=4", "train.global_batch_size=3")


def test_key_value_heads_are_cut_too(load: Any) -> None:
    llama = ["model.family=llama", "model.num_key_value_heads=2"]
    load("sharding.tensor_parallel=2", *llama)
    with pytest.raises(RecipeError, match=r"4 does not divide model.num_key_value_heads, 2; nearest that do all: 2"):
        load("sharding.tensor_parallel=4", *llama)
