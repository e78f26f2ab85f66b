"""From a plan to its model, engine and rows: whose rows, which matrices, on meta until they are placed."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch

import bigtrain
from bigtrain.data.ensure import ensure_prepared
from bigtrain.optim.muon import Muon
from bigtrain.training.build import build_engine, build_loader, build_plan_model
from bigtrain.world import World


def plan_of(recipe: Path, *overrides: str) -> Any:
    return bigtrain.plan(bigtrain.load_recipe(recipe, list(overrides)))


@pytest.mark.parametrize("family", ["bert", "gpt"])
def test_the_model_is_the_plans(tiny_recipes: dict[str, Path], family: str) -> None:
    plan = plan_of(tiny_recipes[family], "train.z_loss=1e-4", "train.label_smoothing=0.1")
    with torch.device("meta"):
        model: Any = build_plan_model(plan)
    assert sum(parameter.numel() for parameter in model.parameters()) >= plan.parameters
    assert all(parameter.is_meta for parameter in model.parameters())
    assert (model.z_loss, model.label_smoothing) == (1e-4, 0.1)
    assert model.loss_chunk_tokens == plan.loss_chunk_tokens


def test_weights_come_from_the_seed(tiny_recipes: dict[str, Path]) -> None:
    one, same, other = (
        build_engine(plan_of(tiny_recipes["gpt"], f"seed={seed}")).model.state_dict() for seed in (1, 1, 2)
    )
    assert all(torch.equal(one[name], same[name]) for name in one)
    assert not all(torch.equal(one[name], other[name]) for name in one)


def test_muon_gets_the_matrices_of_the_blocks(tiny_recipes: dict[str, Path]) -> None:
    engine = build_engine(plan_of(tiny_recipes["gpt"], "optimizer.name=muon"))
    assert isinstance(engine.optimizer, Muon)
    (orthogonal,) = (group["params"] for group in engine.optimizer.param_groups if group["orthogonal"])
    chosen = {id(parameter) for parameter in orthogonal}
    names = [name for name, parameter in engine.parameters.items() if id(parameter) in chosen]
    matrices = [name for name, p in engine.parameters.items() if name.startswith("blocks.") and p.ndim == 2]
    assert names == matrices and names


@pytest.mark.parametrize("ranks", [1, 2, 4])
def test_ranks_read_the_rows_of_one_process_between_them(tiny_recipes: dict[str, Path], ranks: int) -> None:
    plan = plan_of(tiny_recipes["bert"], "train.global_batch_size=8", "train.micro_batch_size=1")
    corpus = ensure_prepared(plan.recipe)

    def first(world: World) -> torch.Tensor:
        loader = build_loader(plan, corpus, world)
        try:
            return next(iter(loader))["input_ids"]
        finally:
            loader.close()

    parts = [first(World(rank, ranks, rank, ranks)) for rank in range(ranks)]
    assert {len(part) for part in parts} == {8 // ranks}
    assert torch.equal(torch.cat(parts), first(World()))
