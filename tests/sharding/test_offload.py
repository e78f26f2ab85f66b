"""Offload on real ranks over gloo: the losses are those of a run that keeps everything, and so is what is predicted."""

from __future__ import annotations

import json
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from group import RANK, told_by_all
from torch import nn
from torch.distributed.fsdp import CPUOffloadPolicy

from bigtrain.config.model import resolve_model
from bigtrain.config.schema import Recipe
from bigtrain.memory.predict import predict
from bigtrain.memory.state import model_state
from bigtrain.processor import has_slow_bf16
from bigtrain.sharding import offload, step_cost
from bigtrain.sharding.offload import pin, policy_of

RANKS = Path(__file__).parent / "ranks_offload.py"
TOLERANCE = 0.002
"""Scalars and small buffers, in models as small as these; 2% is what is promised."""

SHAPE = {"family": "gpt", "hidden_size": 64, "num_hidden_layers": 3, "num_attention_heads": 4}
LOW = {"precision": "bf16", "master_weights": "fp32"}
LEAN = {"precision": "bf16", "master_weights": "split24"}

CASES: dict[str, dict[str, Any]] = {
    "fp32, stage 1, accumulated": {"stage": 1, "steps": 2, "policy": "full"},
    "bf16": {"amp": LOW},
    "bf16, accumulated": {"amp": LOW, "steps": 2},
    "split24, 8bit, accumulated": {"amp": LEAN, "optimizer": {"state": "8bit"}, "steps": 2},
    "lamb": {"optimizer": {"name": "lamb", "state": "bf16"}},
}
OFFLOADS = ("none", "optimizer", "all")
ROUNDED = ("bf16", "bf16, accumulated")
"""Where the device has bf16 weights for `optimizer` and fp32 ones without: gradients are rounded once more."""


def recipe_of(
    *,
    offload: str,
    world_size: int,
    stage: int = 3,
    steps: int = 1,
    amp: dict[str, Any] | None = None,
    policy: str = "none",
    optimizer: dict[str, Any] | None = None,
) -> Recipe:
    sections: dict[str, dict[str, Any]] = {
        "model": SHAPE,
        "data": {"vocab_size": 500, "sequence_length": 64},
        "train": {"objective": "clm", "global_batch_size": 2 * steps * world_size, "micro_batch_size": 2, "steps": 9},
        "optimizer": {"learning_rate": 1e-3, "state": "fp32", "gradient_release": False, **(optimizer or {})},
        "amp": amp or {"precision": "fp32", "master_weights": "fp32"},
        "recompute": {"policy": policy},
        "sharding": {"zero_stage": stage, "replicate": 1, "offload": offload},
        "memory": {"budget": "8GiB"},
    }
    sections["train"] |= {"dropout": 0.0, "device": "cpu", "compile": False}
    return Recipe.model_validate({"name": "offloaded", **sections})


Found = dict[tuple[str, str], dict[str, Any]]


def train(world_size: int, folder: Path) -> list[Found]:
    """Return what each rank found for each offload and case."""
    keys = [(kind, name) for kind in OFFLOADS for name in CASES]
    recipes = [recipe_of(offload=kind, world_size=world_size, **CASES[name]) for kind, name in keys]
    cases = folder / f"cases-{world_size}.json"
    cases.write_text(json.dumps([recipe.model_dump(mode="json") for recipe in recipes]))
    lines = told_by_all([RANKS, RANK, world_size, folder / f"store-{world_size}", cases], world_size)
    return [dict(zip(keys, rank, strict=True)) for rank in lines]


@pytest.fixture(scope="module")
def found(tmp_path_factory: pytest.TempPathFactory) -> dict[int, list[Found]]:
    folder = tmp_path_factory.mktemp("ranks")
    return {world_size: train(world_size, folder) for world_size in (1, 2)}


@pytest.mark.slow
@pytest.mark.parametrize("world_size", [1, 2])
@pytest.mark.parametrize("name", CASES)
def test_losses_are_those_without(name: str, world_size: int, found: dict[int, list[Found]]) -> None:
    for rank in found[world_size]:
        plain, states, streamed = (rank[kind, name]["losses"] for kind in OFFLOADS)
        assert states == (pytest.approx(plain, rel=1e-4) if name in ROUNDED else plain)
        alone = world_size == 1 and "amp" in CASES[name]  # what is not sharded without offload is not rounded either
        assert streamed == (pytest.approx(plain, rel=1e-4) if alone else plain)
        assert plain[-1] < plain[0]


@pytest.mark.slow
@pytest.mark.parametrize("world_size", [1, 2])
@pytest.mark.parametrize("kind", ["optimizer", "all"])
@pytest.mark.parametrize("name", CASES)
def test_a_rank_holds_what_is_predicted(
    name: str, kind: str, world_size: int, found: dict[int, list[Found]], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(step_cost, "COPYING", ())
    recipe, real = recipe_of(offload=kind, world_size=world_size, **CASES[name]), found[world_size][0][kind, name]
    model = resolve_model(recipe.model, vocab_size=500, sequence_length=64)
    accumulated = CASES[name].get("steps", 1) > 1
    state = model_state(recipe, model, accumulated=accumulated, device="cpu", world_size=world_size)
    assert state["weights"] == real["weights"]
    assert state["master_weights"] + state["optimizer_state"] == real["state"]
    assert state["gradients"] == real["gradients"]
    report = predict(recipe, model, device="cpu", slow_bf16=has_slow_bf16(), world_size=world_size, threads=1)
    assert report.allocated_bytes_peak == pytest.approx(real["peak"], rel=TOLERANCE)


def test_only_all_moves_what_is_not_the_optimizer_s() -> None:
    assert [isinstance(policy_of(kind), CPUOffloadPolicy) for kind in OFFLOADS] == [False, False, True]
    policy = policy_of("all")
    assert isinstance(policy, CPUOffloadPolicy)
    assert not policy.pin_memory  # torch's would be rounded up


@pytest.mark.parametrize("groups", ["_fsdp_param_groups", "_fsdp_param_group"])
@pytest.mark.parametrize(("kind", "pinned"), [("cuda", True), ("cpu", False)])
def test_parts_move_to_buffers_of_their_size(
    groups: str, kind: str, pinned: bool, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Stands in for FSDP2's parameters: a part of five rows, of which the last is filling."""
    padded = torch.arange(10.0)
    whole = SimpleNamespace(_local_tensor=padded[:8].view(4, 2))
    kept = SimpleNamespace(_sharded_param_data=padded, sharded_param=whole, pin_memory=False)
    group = SimpleNamespace(fsdp_params=[kept])
    state = SimpleNamespace(**{groups: [group] if groups.endswith("s") else group})

    class Module(nn.Module):
        def _get_fsdp_state(self) -> Any:
            return state

    monkeypatch.setattr(offload, "FSDPModule", Module)
    pin(Module(), torch.device(kind))
    moved, local = kept._sharded_param_data, whole._local_tensor
    assert moved.data_ptr() != padded.data_ptr()
    assert moved.untyped_storage().nbytes() == padded.nbytes
    assert local.data_ptr() == moved.data_ptr()
    assert torch.equal(local, padded[:8].view(4, 2))
    assert kept.pin_memory is pinned
