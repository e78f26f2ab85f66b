"""Real ranks over gloo whose model DeepSpeed shards: they learn what one process learns without it, and save the same.

One pair of ranks, and one process, serve the whole module. No kernel is compiled: nothing here needs a compiler.
"""

from __future__ import annotations

import importlib.util
import json
from pathlib import Path
from typing import Any

import pytest
import torch
from group import RANK, run_group
from torch import nn

from bigtrain.config.schema import Recipe
from bigtrain.errors import InputError
from bigtrain.optim.adamw import AdamW
from bigtrain.optim.build import build_optimizer
from bigtrain.sharding import deepspeed

RANKS = Path(__file__).parent / "ranks_deepspeed.py"
WORLD_SIZE = 2
STEPS = 15
PATIENCE_SECONDS = 560
TOLERANCE = 1e-4
BF16_TOLERANCE = 1e-3

SHAPE = {"hidden_size": 64, "num_hidden_layers": 2, "num_attention_heads": 4, "intermediate_size": 129}
"""An odd width inside the MLP: its rows do not divide among two ranks."""
GPT = {"family": "gpt"}
LLAMA = {"family": "llama", "num_key_value_heads": 2, "tie_word_embeddings": False}
WITHOUT_EXCEPTION = {"stage3_param_persistence_threshold": 0}
"""Every parameter is cut, small ones as well, which DeepSpeed leaves whole otherwise."""

pytestmark = pytest.mark.timeout(600)
"""The ranks take a minute on two cores of their own, and more where these are busy."""

needed = pytest.mark.skipif(importlib.util.find_spec("deepspeed") is None, reason="DeepSpeed is not installed")

CASES: dict[str, dict[str, Any]] = {
    "stage 1": {"stage": 1, "model": GPT, "steps": STEPS, "resumed": True},
    "stage 2": {"stage": 2, "steps": STEPS, "skipped": True, "evaluated": True},
    "stage 2, offload": {"stage": 2, "model": GPT, "offload": "optimizer", "clip": None},
    "stage 3": {"stage": 3, "model": LLAMA, "steps": STEPS, "policy": "full", "skipped": True, "evaluated": True},
    "stage 3, all cut": {"stage": 3, "model": GPT, "policy": "selective", "resumed": True, "zero": WITHOUT_EXCEPTION},
    "stage 3, offload": {"stage": 3, "offload": "all", "evaluated": True, "zero": WITHOUT_EXCEPTION},
    "stage 1, bf16": {"stage": 1, "precision": "bf16", "resumed": True, "skipped": True},
    "stage 2, bf16": {"stage": 2, "precision": "bf16", "model": LLAMA, "reduce": "bf16"},
    "stage 3, bf16": {"stage": 3, "precision": "bf16", "model": GPT, "resumed": True, "skipped": True},
}
RESUMED, SKIPPED, EVALUATED = (
    [name for name in CASES if key in CASES[name]] for key in ("resumed", "skipped", "evaluated")
)
ALONE = "stage 2, one rank"


def recipe_of(case: dict[str, Any], **sharding: Any) -> Recipe:
    """Return a recipe without `auto` for two ranks that take three micro-batches each."""
    shape = {"family": "bert", **SHAPE, **case.get("model", {})}
    sections: dict[str, dict[str, Any]] = {
        "model": shape,
        "data": {"vocab_size": 500, "sequence_length": 64},
        "train": {
            "objective": "mlm" if shape["family"] == "bert" else "clm",
            "global_batch_size": 6,
            "micro_batch_size": 1,
            "steps": 10,
            "dropout": 0.0,
            "max_grad_norm": case.get("clip", 1.0),
            "device": "cpu",
            "compile": False,
        },
        "optimizer": {"learning_rate": 1e-3, "state": "fp32", "gradient_release": False},
        "amp": {"precision": case.get("precision", "fp32"), "reduce": case.get("reduce", "fp32")},
        "recompute": {"policy": case.get("policy", "none")},
        "sharding": {
            "engine": "deepspeed",
            "zero_stage": case["stage"],
            "replicate": 1,
            "offload": case.get("offload", "none"),
            **sharding,
        },
        "memory": {"budget": "8GiB"},
    }
    return Recipe.model_validate({"name": "deepspeed", **sections})


def written(case: dict[str, Any], **more: Any) -> dict[str, Any]:
    return {"steps": 3, **case, "recipe": recipe_of(case).model_dump(mode="json"), **more}


def train(cases: list[dict[str, Any]], world_size: int, folder: Path) -> list[list[dict[str, Any]]]:
    """Return what each rank found for each case."""
    path = folder / f"cases-{world_size}.json"
    path.write_text(json.dumps(cases))
    command = [RANKS, RANK, world_size, folder / f"store-{world_size}", path]
    ranks = run_group(command, world_size, seconds=PATIENCE_SECONDS)
    assert not any(rank.code or rank.errors for rank in ranks), ranks
    return [[json.loads(line) for line in rank.out.splitlines()] for rank in ranks]


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return tmp_path_factory.mktemp("deepspeed")


@pytest.fixture(scope="module")
def found(folder: Path) -> list[dict[str, dict[str, Any]]]:
    """Return what each rank found, by case."""
    cases = [*(written(case) for case in CASES.values()), written(CASES["stage 3, offload"], ignored=True)]
    ranks = train(cases, WORLD_SIZE, folder)
    return [dict(zip([*CASES, "keys"], rank, strict=True)) for rank in ranks]


@pytest.fixture(scope="module")
def alone(folder: Path) -> dict[str, dict[str, Any]]:
    """Return what one process found without DeepSpeed, by case, and with it."""
    plain = (
        {key: value for key, value in case.items() if key not in ("resumed", "skipped")} for case in CASES.values()
    )
    cases = [written(case, alone=True) for case in plain]
    (rank,) = train([*cases, written({**CASES["stage 2"], "steps": 3})], 1, folder)
    return dict(zip([*CASES, ALONE], rank, strict=True))


@needed
@pytest.mark.slow
@pytest.mark.parametrize("name", CASES)
def test_masters_are_the_weights_before_they_were_rounded(name: str, found: list[dict[str, dict[str, Any]]]) -> None:
    assert found[0][name]["exact"]


@needed
@pytest.mark.slow
@pytest.mark.parametrize("name", CASES)
def test_ranks_learn_what_one_process_learns(
    name: str, found: list[dict[str, dict[str, Any]]], alone: dict[str, dict[str, Any]]
) -> None:
    one, together = alone[name], found[0][name]
    assert found[1][name]["losses"] == together["losses"]
    within = TOLERANCE if CASES[name].get("precision", "fp32") == "fp32" else BF16_TOLERANCE
    assert together["losses"] == pytest.approx(one["losses"], rel=within)
    assert together["norms"] == pytest.approx(one["norms"], rel=within if within == TOLERANCE else 0.05)
    assert one["losses"][-1] < one["losses"][0]


@needed
@pytest.mark.slow
def test_one_rank_learns_the_same(alone: dict[str, dict[str, Any]]) -> None:
    assert alone[ALONE]["losses"] == pytest.approx(alone["stage 2"]["losses"][:3], rel=TOLERANCE)


@needed
@pytest.mark.slow
@pytest.mark.parametrize("name", RESUMED)
def test_what_is_saved_goes_on_bitwise_here_and_the_same_without_deepspeed(
    name: str, found: list[dict[str, dict[str, Any]]]
) -> None:
    result = found[0][name]
    assert result["exactly"]
    assert result["on again"] == result["on"]
    exact = CASES[name].get("precision", "fp32") == "fp32"
    for here, without in zip(result["on"], result["on alone"], strict=True):
        assert here == pytest.approx(without, rel=TOLERANCE if exact else BF16_TOLERANCE)


@needed
@pytest.mark.slow
@pytest.mark.parametrize("name", RESUMED)
def test_weights_alone_start_without_states(name: str, found: list[dict[str, dict[str, Any]]]) -> None:
    assert found[0][name]["weights alone"]


@needed
@pytest.mark.slow
@pytest.mark.parametrize("name", SKIPPED)
def test_a_loss_that_is_not_finite_changes_nothing(name: str, found: list[dict[str, dict[str, Any]]]) -> None:
    for rank in found:
        skipped, same, goes_on = rank[name]["skipped"]
        assert skipped
        assert same
        assert goes_on


@needed
@pytest.mark.slow
@pytest.mark.parametrize("name", EVALUATED)
def test_evaluation_is_that_of_the_same_weights(
    name: str, found: list[dict[str, dict[str, Any]]], alone: dict[str, dict[str, Any]]
) -> None:
    assert found[0][name]["evaluation"] == pytest.approx(alone[name]["evaluation"], rel=TOLERANCE)
    assert found[0][name]["names"] == alone[name]["names"]
    assert found[0][name]["training"]


@needed
@pytest.mark.slow
def test_no_key_of_the_configuration_is_ignored(found: list[dict[str, dict[str, Any]]]) -> None:
    assert found[0]["keys"] == {"ignored": []}


def parameters() -> list[nn.Parameter]:
    module = nn.Sequential(nn.Linear(8, 4), nn.LayerNorm(4)).to(torch.bfloat16)
    return list(module.parameters())


def test_stand_ins_are_fp32_of_the_same_shapes_and_hold_one_number() -> None:
    real = parameters()
    real[1].requires_grad_(False)
    found = deepspeed._stand_ins(real)
    assert [p.shape for p in found] == [p.shape for p in real]
    assert all(p.dtype == torch.float32 and p.untyped_storage().nbytes() == 4 for p in found)
    assert [p.requires_grad for p in found] == [p.requires_grad for p in real]


def test_an_optimizer_made_of_stand_ins_gets_the_parameters() -> None:
    real = parameters()
    section = Recipe.model_validate(written({"stage": 1})["recipe"]).optimizer
    built = build_optimizer(deepspeed._stand_ins(real), section)
    assert isinstance(built, AdamW)
    deepspeed._give_back(built)
    matrices, rest = (group["params"] for group in built.param_groups)
    assert [id(p) for p in matrices] == [id(real[0])]
    assert [id(p) for p in rest] == [id(p) for p in real[1:]]


def test_step_counts_that_differ_are_refused() -> None:
    counts = {name: {"step": torch.tensor(float(count))} for name, count in {"a": 3, "b": 3, "c": 2}.items()}
    with pytest.raises(InputError, match="one step count for all parameters, and here are 2, 3"):
        deepspeed._check_counts(counts)
    deepspeed._check_counts({name: counts[name] for name in "ab"})
    deepspeed._check_counts({})


class Loaded:
    """A DeepSpeed that was loaded for a kind of device, whose libraries are there or not."""

    def __init__(self, *, aio: bool) -> None:
        self.aio, self.accelerator = aio, self

    def get_accelerator(self) -> Loaded:
        return self

    def create_op_builder(self, name: str) -> Loaded:
        assert name == "AsyncIOBuilder"
        return self

    def is_compatible(self, *, verbose: bool) -> bool:
        return self.aio


@pytest.mark.parametrize("device", ["none", "cpu", "nvme"])
def test_nvme_without_its_library_is_refused(device: str) -> None:
    config = {"zero_optimization": {"offload_optimizer": {"device": device}}}
    deepspeed._check_nvme(Loaded(aio=True), config)
    if device != "nvme":
        deepspeed._check_nvme(Loaded(aio=False), config)
        return
    with pytest.raises(InputError, match="sharding.offload: nvme: .*libaio-dev.*use sharding.offload=all"):
        deepspeed._check_nvme(Loaded(aio=False), config)
