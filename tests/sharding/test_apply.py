"""Real ranks over gloo: what each holds is what is predicted, and what they learn is what one process learns."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
import torch
from group import RANK, told_by_all
from torch import nn

from bigtrain.config.model import resolve_model
from bigtrain.config.schema import Recipe
from bigtrain.errors import InputError
from bigtrain.memory.predict import buffer_bytes, predict
from bigtrain.memory.state import model_state
from bigtrain.processor import has_slow_bf16
from bigtrain.sharding import step_cost
from bigtrain.sharding.apply import hand_over_gradients, local_parameters, shard

RANKS = Path(__file__).parent / "ranks.py"
WORLD_SIZE = 2
TOLERANCE = 0.0005
"""The scalars of a step, in models as small as these; 2% is what is promised."""

SHAPE = {"hidden_size": 64, "num_hidden_layers": 3, "num_attention_heads": 4, "intermediate_size": 128}
GPT = {"family": "gpt"}
LLAMA = {"family": "llama", "num_key_value_heads": 2, "tie_word_embeddings": False}
LOW = {"precision": "bf16", "master_weights": "fp32"}
LEAN = {"precision": "bf16", "master_weights": "split24"}

CASES: dict[str, dict[str, Any]] = {
    "stage 0": {"stage": 0, "model": GPT},
    "stage 0, accumulated, split24": {"stage": 0, "micro": 1, "steps": 3, "amp": LEAN, "state": "8bit"},
    "stage 1": {"stage": 1, "micro": 1, "steps": 3},
    "stage 1, bf16": {"stage": 1, "steps": 2, "model": LLAMA, "amp": LOW, "policy": "full"},
    "stage 2": {
        "stage": 2,
        "micro": 1,
        "steps": 3,
        "model": GPT,
        "policy": ["full", "none", "selective"],
    },
    "stage 2, bf16": {"stage": 2, "amp": LOW, "model": LLAMA, "policy": "selective"},
    "stage 3": {"stage": 3, "model": LLAMA},
    "stage 3, accumulated": {"stage": 3, "steps": 2, "micro": 1, "policy": "full"},
    "stage 3, bf16": {"stage": 3, "steps": 2, "amp": LOW, "model": GPT},
    "stage 3, split24, accumulated": {"stage": 3, "steps": 2, "amp": LEAN, "state": "8bit"},
}
EXACT = [name for name, case in CASES.items() if "amp" not in case]
"""Computed in fp32, so that the losses are those of one process."""


def recipe_of(
    *,
    stage: int,
    replicate: int = 1,
    micro: int = 2,
    steps: int = 1,
    model: dict[str, Any] | None = None,
    amp: dict[str, Any] | None = None,
    policy: str | list[str] = "none",
    state: str = "fp32",
    offload: str = "none",
) -> Recipe:
    """Return a recipe without `auto` for two ranks that take so many micro-batches each."""
    shape = {"family": "bert", **SHAPE, **(model or {})}
    sections: dict[str, dict[str, Any]] = {
        "model": shape,
        "data": {"vocab_size": 500, "sequence_length": 64},
        "train": {
            "objective": "mlm" if shape["family"] == "bert" else "clm",
            "global_batch_size": WORLD_SIZE * micro * steps,
            "micro_batch_size": micro,
            "steps": 10,
            "dropout": 0.0,
            "device": "cpu",
            "compile": False,
        },
        "optimizer": {"learning_rate": 1e-3, "state": state, "gradient_release": False},
        "amp": amp or {"precision": "fp32", "master_weights": "fp32"},
        "recompute": {"policy": policy},
        "sharding": {"zero_stage": stage, "replicate": replicate, "offload": offload},
        "memory": {"budget": "8GiB"},
    }
    return Recipe.model_validate({"name": "sharded", **sections})


def train(recipes: list[Recipe], world_size: int, folder: Path) -> list[list[dict[str, Any]]]:
    """Return what each rank found for each recipe."""
    cases = folder / f"cases-{world_size}.json"
    cases.write_text(json.dumps([recipe.model_dump(mode="json") for recipe in recipes]))
    store = folder / f"store-{world_size}"
    return told_by_all([RANKS, RANK, world_size, store, cases], world_size)


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return tmp_path_factory.mktemp("ranks")


@pytest.fixture(scope="module")
def found(folder: Path) -> list[dict[str, dict[str, Any]]]:
    """Return what each rank found, by case."""
    ranks = train([recipe_of(**case) for case in CASES.values()], WORLD_SIZE, folder)
    return [dict(zip(CASES, rank, strict=True)) for rank in ranks]


@pytest.fixture(scope="module")
def alone(folder: Path) -> dict[str, dict[str, Any]]:
    (rank,) = train([recipe_of(**CASES[name]) for name in EXACT], 1, folder)
    return dict(zip(EXACT, rank, strict=True))


@pytest.mark.slow
@pytest.mark.parametrize("name", CASES)
def test_a_rank_holds_what_is_predicted(
    name: str, found: list[dict[str, dict[str, Any]]], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(step_cost, "COPYING", ())
    recipe, real = recipe_of(**CASES[name]), found[0][name]
    model = resolve_model(recipe.model, vocab_size=500, sequence_length=64)
    accumulated = CASES[name].get("steps", 1) > 1
    state = model_state(recipe, model, accumulated=accumulated, world_size=WORLD_SIZE)
    assert state["weights"] == real["weights"]
    assert state["master_weights"] + state["optimizer_state"] == real["optimizer_state"]
    assert state["gradients"] == real["gradients"]
    buffers = buffer_bytes(recipe, model, accumulated=accumulated, device="cpu", world_size=WORLD_SIZE)
    assert buffers == real["buffers"]
    report = predict(recipe, model, device="cpu", slow_bf16=has_slow_bf16(), world_size=WORLD_SIZE, threads=1)
    assert report.allocated_bytes_peak == pytest.approx(real["peak"], rel=TOLERANCE)


@pytest.mark.slow
def test_no_rank_holds_more_than_the_first(found: list[dict[str, dict[str, Any]]]) -> None:
    first, second = found
    assert all(second[name]["peak"] <= first[name]["peak"] * (1 + TOLERANCE) for name in CASES)


@pytest.mark.nightly  # always for more steps, stages and worlds in tests/test_same_run_ranks.py
@pytest.mark.parametrize("name", EXACT)
def test_ranks_learn_what_one_process_learns(
    name: str, found: list[dict[str, dict[str, Any]]], alone: dict[str, dict[str, Any]]
) -> None:
    ranks = zip(*(rank[name]["losses"] for rank in found), strict=True)
    together = [sum(losses) / WORLD_SIZE for losses in ranks]
    assert together == pytest.approx(alone[name]["losses"], rel=1e-5)
    assert together[-1] < together[0]


class Mesh:
    """What is read of a mesh before anything is done."""

    def __init__(self, *shape: int) -> None:
        self.shape, self.ndim = shape, len(shape)

    def size(self, dim: int) -> int:
        return self.shape[dim]


@pytest.mark.parametrize(("stage", "shape"), [(4, (2,)), (0, (2,)), (0, (1, 2)), (3, (1, 2, 1))], ids=str)
def test_what_cannot_be_sharded_so(stage: int, shape: tuple[int, ...]) -> None:
    mesh: Any = Mesh(*shape)
    with pytest.raises(InputError, match=r"sharding.*; use|is none of"):
        shard(nn.Linear(2, 2), [], mesh, zero_stage=stage)


def test_gradients_go_to_the_optimizer() -> None:
    layer = nn.Linear(3, 2)
    parameters = list(layer.parameters())
    local = local_parameters(parameters)
    layer(torch.ones(1, 3)).sum().backward()
    hand_over_gradients(parameters, local)
    assert [p.grad is None for p in parameters] == [True, True]
    assert [tuple(mine.grad.shape) for mine in local if mine.grad is not None] == [(2, 3), (2,)]
    assert [mine.data_ptr() for mine in local] == [p.data_ptr() for p in parameters]
