"""Real steps of the shipped engine: what is measured by cause is what is predicted, and nothing else is counted."""

from __future__ import annotations

import itertools
from typing import Any

import pytest
import torch
from torch import nn

import bigtrain
from bigtrain.batch import Batch
from bigtrain.config.schema import Recipe
from bigtrain.engine import Engine
from bigtrain.memory.predict import predict
from bigtrain.placement import find_blocks
from bigtrain.planner import hardware
from bigtrain.planner.plan import Plan
from bigtrain.profiling import steps
from bigtrain.profiling.steps import TIMED_STEPS, Measured, Steps
from bigtrain.training.build import build_engine
from tests.shared.beside_blocks import record_beside_blocks

SCALARS, SCALARS_OF_BERT = 64, 192
"""Bytes: losses, norms, bounds of documents and the like, which predictions leave out."""
TINY = {"hidden_size": 64, "num_hidden_layers": 2, "num_attention_heads": 2, "intermediate_size": 128}
WAYS: dict[str, dict[str, dict[str, Any]]] = {
    "plain": {},
    "accumulated": {"train": {"micro_batch_size": 1}},
    "full": {"recompute": {"policy": "full"}},
    "selective": {"recompute": {"policy": "selective"}},
    "bf16": {"amp": {"precision": "bf16"}},
    "split24": {"amp": {"precision": "bf16", "master_weights": "split24"}},
    "8bit": {"optimizer": {"state": "8bit"}},
}
FAMILIES = ("bert", "gpt", "llama")


def plan_of(family: str, sections: dict[str, dict[str, Any]]) -> Plan:
    chosen: dict[str, dict[str, Any]] = {
        "model": {"family": family, **TINY},
        "data": {"vocab_size": 1000, "sequence_length": 48},
        "train": {
            "objective": "mlm" if family == "bert" else "clm",
            "global_batch_size": 2,
            "micro_batch_size": 2,
            "steps": 10,
            "device": "cpu",
            "compile": False,
        },
        "optimizer": {"learning_rate": 1e-3, "state": "fp32", "gradient_release": False},
        "amp": {"precision": "fp32", "master_weights": "fp32"},
        "recompute": {"policy": "none"},
    }
    merged = {name: {**chosen.get(name, {}), **sections.get(name, {})} for name in {**chosen, **sections}}
    return bigtrain.plan(Recipe.model_validate({"name": "profiled", **merged}), hardware.cpu())


def rows_of(plan: Plan) -> Batch:
    count, length = plan.recipe.train.global_batch_size, plan.recipe.data.sequence_length
    ids = torch.randint(5, plan.model.vocab_size, (count, length))
    labels = ids.clone()
    if plan.recipe.train.objective == "mlm":
        hidden = round(plan.recipe.train.masking_probability * length)
        labels[torch.rand(count, length).argsort(1).argsort(1) >= hidden] = -100
    return {"input_ids": ids, "labels": labels, "document_lengths": torch.full((count, 1), length)}


def measured(plan: Plan, **options: Any) -> Measured:
    return Steps(
        build=lambda: build_engine(plan),
        batches=itertools.repeat(rows_of(plan)),
        blocks=find_blocks,
        device="cpu",
        seed=plan.recipe.seed,
        max_norm=plan.recipe.train.max_grad_norm,
        head=(plan.model.padded_vocab_size, plan.model.hidden_size),
    ).measure(**options)


@pytest.fixture(autouse=True)
def seeded(torch_seed: int) -> None:
    """Draw the same in every run."""


@pytest.fixture(autouse=True)
def beside_blocks(monkeypatch: pytest.MonkeyPatch) -> None:
    """Leave out what no price names."""
    monkeypatch.setattr(steps, "record", record_beside_blocks)


@pytest.mark.parametrize(("way", "family"), list(zip(WAYS, itertools.cycle(FAMILIES), strict=False)))
def test_every_cause_is_measured_as_predicted(way: str, family: str) -> None:
    plan = plan_of(family, WAYS[way])
    found = dict(measured(plan).memory.by_cause)
    scalars = SCALARS_OF_BERT if family == "bert" else SCALARS
    slow, threads = plan.hardware.slow_bf16, torch.get_num_threads()
    report = predict(plan.recipe, plan.model, device="cpu", slow_bf16=slow, threads=threads)
    expected = dict(report.by_cause)
    if way == "selective":
        # Two moments of its backward pass hold as much but for scalars: here a block's input, there its gradient.
        for side in (found, expected):
            side["activations"] += side.pop("temporaries")
    assert {cause: (found[cause], size) for cause, size in expected.items() if abs(found[cause] - size) > scalars} == {}


def test_the_whole_is_what_a_profile_from_before_the_model_shows() -> None:
    plan = plan_of("gpt", {})
    found = measured(plan)
    assert found.memory.allocated_bytes_peak == sum(found.memory.by_cause.values())
    assert found.memory.reserved_bytes_peak == found.memory.allocated_bytes_peak
    assert found.memory.host_bytes_peak is not None
    assert found.memory.host_bytes_peak > found.memory.allocated_bytes_peak
    assert found.memory.by_cause["weights"] == 4 * sum(p.numel() for p in build_engine(plan).model.parameters())


def test_a_step_is_told_apart_by_place_and_phase() -> None:
    found = measured(plan_of("gpt", {}))
    assert found.step in ("step 1", "step 2")
    labels = found.recording.timeline(found.step)["label"]
    assert isinstance(labels, list)
    order = ["forward", "blocks.0 forward", "blocks.1 forward", "blocks.1 backward", "blocks.0 backward", "update"]
    assert [label for label in dict.fromkeys(labels) if label in order] == order
    places = found.recording.places_at_peak(found.step)
    assert set(places) == {"", "blocks.0", "blocks.1"}
    assert sum(places.values()) == found.memory.allocated_bytes_peak


def test_further_steps_are_timed_without_the_profiler() -> None:
    plan = plan_of("gpt", {})
    taken: list[int] = []

    def batches() -> Any:
        for number in itertools.count():
            taken.append(number)
            yield rows_of(plan)

    found = Steps(lambda: build_engine(plan), batches(), find_blocks, "cpu").measure()
    assert len(taken) == 3 + TIMED_STEPS
    assert found.step_seconds > 0


def test_logits_are_not_told_without_the_head() -> None:
    plan = plan_of("gpt", {})
    found = Steps(lambda: build_engine(plan), itertools.repeat(rows_of(plan)), find_blocks, "cpu").measure()
    assert found.memory.by_cause["logits"] == 0


def test_steps_are_those_of_the_loop() -> None:
    plan = plan_of("bert", {"train": {"dropout": 0.1, "micro_batch_size": 1}})
    batch = rows_of(plan)
    engines: list[Engine] = []

    def build() -> Engine:
        engines.append(build_engine(plan))
        return engines[0]

    Steps(build, itertools.repeat(batch), find_blocks, "cpu", plan.recipe.seed).measure()
    other = plain_steps(build_engine(plan), batch, plan.recipe.seed, engines[0].steps_taken)
    ours = dict(engines[0].model.named_parameters())
    assert all(torch.equal(ours[name], theirs) for name, theirs in other.named_parameters())


def plain_steps(engine: Engine, batch: Batch, seed: int, count: int) -> nn.Module:
    from bigtrain.training.runtime import seed_step

    for number in range(count):
        seed_step(seed, number)
        for micro in engine.micro_batches(batch):
            engine.backward(engine.model(**micro))
        engine.step()
    return engine.model


@pytest.mark.gpu
def test_on_cuda_the_peak_is_the_allocators() -> None:
    plan = plan_of("gpt", {"train": {"device": "cuda"}})
    cuda = hardware.cuda_devices()
    assert cuda is not None
    plan = bigtrain.plan(plan.recipe, cuda)
    steps = Steps(lambda: build_engine(plan), itertools.repeat(rows_of(plan)), find_blocks, "cuda")
    before = torch.cuda.memory_allocated()
    found = steps.measure()
    assert found.memory.allocated_bytes_peak == torch.cuda.max_memory_allocated() - before
    assert found.memory.device_bytes_peak is not None
    assert found.memory.reserved_bytes_peak is not None
    assert found.memory.device_bytes_peak > found.memory.reserved_bytes_peak >= found.memory.allocated_bytes_peak
