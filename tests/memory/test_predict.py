"""The prediction of a step: causes that sum up, and what must make it larger or smaller."""

from __future__ import annotations

import os
from pathlib import Path
from typing import Any

import pytest
import torch._dynamo

import bigtrain
from bigtrain.config.load import load_recipe
from bigtrain.ledger import Ledger
from bigtrain.memory.predict import Step, buffer_bytes, micro_batch, predict, torch_threads
from bigtrain.memory.record import Events
from bigtrain.memory.report import MemoryReport
from bigtrain.memory.state import model_state
from bigtrain.planner.hardware import Hardware
from bigtrain.planner.plan import Plan

CPU = Hardware("cpu", "a processor", 1, 2**40, slow_bf16=True)
CUDA = Hardware("cuda", "a GPU", 1, 2**37, capability=(9, 0))
RECIPES = Path(__file__).parents[2] / "recipes"
KEYS = ("train.micro_batch_size=4", "train.global_batch_size=4", "train.compile=false")


def plan_of(*overrides: str, hardware: Hardware = CPU) -> Plan:
    keys = [*KEYS, f"train.device={hardware.kind}", *overrides]
    return bigtrain.plan(load_recipe(RECIPES / "quickstart_bert.yaml", keys), hardware)


def report_of(*overrides: str, hardware: Hardware = CPU, **options: Any) -> MemoryReport:
    plan = plan_of(*overrides, hardware=hardware)
    return predict(plan.recipe, plan.model, device=hardware.kind, slow_bf16=hardware.slow_bf16, **options)


def peak(*overrides: str, hardware: Hardware = CPU, **options: Any) -> int:
    return report_of(*overrides, hardware=hardware, **options).allocated_bytes_peak


RELEASED = ("optimizer.gradient_release=true", "train.max_grad_norm=null")
LEAN = ("amp.precision=bf16", "amp.master_weights=split24", "optimizer.state=8bit")


@pytest.mark.parametrize("overrides", [(), RELEASED, LEAN, (*LEAN, *RELEASED, "recompute.policy=full")], ids=str)
def test_the_peak_holds_the_state_exactly(overrides: tuple[str, ...]) -> None:
    plan, report = plan_of(*overrides), report_of(*overrides)
    assert sum(report.by_cause.values()) == report.allocated_bytes_peak
    assert all(size >= 0 for size in report.by_cause.values())
    for cause in ("weights", "master_weights", "optimizer_state"):
        assert report.by_cause[cause] == plan.state_bytes[cause]


def test_released_gradients_are_no_state() -> None:
    assert plan_of(*RELEASED).state_bytes["gradients"] == 0
    assert plan_of().state_bytes["gradients"] == plan_of().state_bytes["weights"]
    deep = (
        "model.num_hidden_layers=12",
        "recompute.policy=full",
        "train.micro_batch_size=1",
        "train.global_batch_size=1",
    )
    assert peak(*RELEASED, *deep) < peak(*deep)


def test_a_larger_micro_batch_holds_more() -> None:
    sizes = [peak(f"train.micro_batch_size={size}", "train.global_batch_size=16") for size in (1, 2, 4, 8)]
    assert sizes == sorted(sizes)
    assert sizes[0] < sizes[-1]


def test_each_policy_holds_less_than_the_one_before() -> None:
    none, selective, full = (peak(f"recompute.policy={policy}") for policy in ("none", "selective", "full"))
    assert none > selective > full


def test_offloaded_inputs_are_elsewhere() -> None:
    many = ("train.micro_batch_size=64", "train.global_batch_size=64", "amp.precision=bf16")
    full, offload = (peak(*many, f"recompute.policy={policy}", hardware=CUDA) for policy in ("full", "offload"))
    assert offload < full


def test_several_micro_batches_find_gradients() -> None:
    assert peak("train.micro_batch_size=2") > peak("train.micro_batch_size=2", "train.global_batch_size=2")


def test_low_precision_holds_less() -> None:
    assert peak(*LEAN) < peak("amp.precision=bf16")


def test_threads_have_room_of_their_own() -> None:
    long = ("train.micro_batch_size=1", "recompute.policy=full", "data.vocab_size=512")
    assert peak(*long, threads=64) > peak(*long, threads=1)
    assert peak(*long) == peak(*long, threads=torch_threads())


def test_a_small_budget_cuts_the_loss() -> None:
    rows = (
        "train.micro_batch_size=64",
        "train.global_batch_size=64",
        "recompute.policy=full",
        "train.masking_probability=0.8",
    )
    small, large = (report_of(*rows, f"memory.budget={budget}").by_cause["logits"] for budget in ("640MiB", "64GiB"))
    assert small < large


def test_ranks_share_the_batch() -> None:
    plan = plan_of("train.micro_batch_size=2")
    alone, shared = (
        predict(plan.recipe, plan.model, device="cpu", slow_bf16=True, world_size=size).allocated_bytes_peak
        for size in (1, 2)
    )
    assert shared < alone  # one micro-batch each: no gradients are there before


def test_masked_positions_are_gathered() -> None:
    found = micro_batch(plan_of("train.masking_probability=0.15").recipe, 4)
    length = plan_of().recipe.data.sequence_length
    assert (found.tokens, found.longest, found.gathered) == (4 * length, length, True)
    assert found.labels == 4 * round(0.15 * length)
    assert not micro_batch(plan_of("train.masking_probability=0.6").recipe, 4).gathered


def test_model_state_is_what_the_plan_says() -> None:
    plan = plan_of(*LEAN)
    assert model_state(plan.recipe, plan.model, accumulated=False) == plan.state_bytes
    wide = model_state(plan.recipe, plan.model, accumulated=True)
    assert wide["gradients"] == 2 * plan.state_bytes["gradients"]


def test_accumulated_gradients_need_no_buffer_to_be_widened() -> None:
    plan = plan_of(*LEAN)
    sizes = [buffer_bytes(plan.recipe, plan.model, accumulated=wide, device="cpu") for wide in (False, True)]
    assert sizes[0] > sizes[1] > 0


def events_of(plan: Plan, world_size: int) -> list[int]:
    """Return the allocations and releases of two steps in order."""
    recording, hardware = Events(), plan.hardware
    step = Step(
        plan.recipe,
        plan.model,
        Ledger(recording),
        device=hardware.kind,
        slow_bf16=hardware.slow_bf16,
        world_size=world_size,
    )
    step.run_twice(recording)
    return recording.events


@pytest.mark.parametrize(("hardware", "world_size"), [(CPU, 1), (CUDA, 1), (CUDA, 2)], ids=["cpu", "cuda", "ranks"])
@pytest.mark.parametrize("policy", ["none", "selective", "full"])
@pytest.mark.parametrize(("family", "objective"), [("bert", "mlm"), ("gpt", "clm"), ("llama", "clm")])
def test_what_watches_the_calls_of_python_changes_nothing(
    family: str, objective: str, policy: str, hardware: Hardware, world_size: int
) -> None:
    """Under torch.compile's hook arguments live until a call returns, else until the function lets go of them."""
    kinds = (f"model.family={family}", f"train.objective={objective}", f"recompute.policy={policy}")
    sharding = ("sharding.zero_stage=3", "train.micro_batch_size=2") if world_size > 1 else ()
    recipe = load_recipe(RECIPES / "quickstart_bert.yaml", [*KEYS, f"train.device={hardware.kind}", *kinds, *sharding])
    plan = bigtrain.plan(recipe, hardware, world_size=world_size)
    hooked = torch._dynamo.run(events_of)  # type: ignore[no-untyped-call]
    assert hooked(plan, world_size) == events_of(plan, world_size)


@pytest.mark.parametrize(("written", "threads"), [("3", 3), ("4,2", 4), ("0", 1)])
def test_threads_as_written(written: str, threads: int, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("OMP_NUM_THREADS", written)
    assert torch_threads() == threads


def test_threads_of_this_machine(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delenv("OMP_NUM_THREADS", raising=False)
    assert 1 <= torch_threads() <= (os.cpu_count() or 1)


def test_on_a_gpu_the_batch_before_is_held_only_where_a_step_has_several() -> None:
    def ahead(batch: int) -> bool:
        plan = plan_of(f"train.global_batch_size={batch}", hardware=CUDA)
        step = Step(plan.recipe, plan.model, Ledger(), device="cuda", slow_bf16=False)
        step.run()
        return len(step._held[""]) > 1

    assert [ahead(batch) for batch in (4, 16)] == [False, True]
