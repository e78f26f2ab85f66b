"""Out of memory in a run: the error that ends it, from a real limit on the process and from errors made up."""

from __future__ import annotations

import os
import re
import subprocess
import sys
from pathlib import Path

import pytest
import torch

import bigtrain
from bigtrain.engine import Engine
from bigtrain.errors import OutOfMemory
from bigtrain.memory.exhausted import Exhausted
from bigtrain.memory.report import MemoryReport
from bigtrain.planner import hardware
from bigtrain.planner.plan import Plan
from bigtrain.training.build import build_engine
from bigtrain.training.out_of_memory import fitting_budget_bytes, memory_explained

CPU = "DefaultCPUAllocator: can't allocate memory: you tried to allocate 67108864 bytes."
PINNED = (
    "train.device=cpu",
    "train.compile=false",
    "train.global_batch_size=8",
    "train.micro_batch_size=8",
    "recompute.policy=none",
    "optimizer.state=fp32",
    "optimizer.gradient_release=false",
    "amp.precision=fp32",
)
LIMITED = """
import resource, sys
import torch
import bigtrain
from bigtrain.engine import Engine
from bigtrain.planner import hardware

plain = Engine.micro_batches

def limited(self, batch):
    pages = int(open("/proc/self/statm").read().split()[0])
    limit = pages * resource.getpagesize() + 64 * 2**20
    resource.setrlimit(resource.RLIMIT_AS, (limit, resource.RLIM_INFINITY))
    return plain(self, batch)

Engine.micro_batches = limited
plan = bigtrain.plan(bigtrain.load_recipe(sys.argv[1], sys.argv[3:]), hardware.cpu())
try:
    bigtrain.train(plan, sys.argv[2])
except bigtrain.BigtrainError as error:
    assert isinstance(error.__cause__, RuntimeError)
    sys.exit(error.report())
"""


def plan_of(recipe: Path, *overrides: str) -> Plan:
    return bigtrain.plan(bigtrain.load_recipe(recipe, [*PINNED, *overrides]), hardware.cpu())


@pytest.mark.slow
@pytest.mark.skipif(sys.platform != "linux", reason="limits of the address space are Linux's")
def test_under_a_real_limit(tiny_recipes: dict[str, Path], tmp_path: Path) -> None:
    wide = (
        "model.hidden_size=256",
        "model.intermediate_size=8192",
        "train.global_batch_size=32",
        "train.micro_batch_size=32",
    )
    command = [sys.executable, "-c", LIMITED, tiny_recipes["gpt"], tmp_path / "run", *PINNED, *wide]
    done = subprocess.run(
        command, capture_output=True, text=True, check=False, env={**os.environ, "OMP_NUM_THREADS": "1"}
    )
    assert done.returncode == 1, done.stderr
    lines = [line.removeprefix("error: ") for line in done.stderr.splitlines() if line.startswith("error: ")]
    assert re.match(
        r"step 1: out of memory in the \w+.*: [\d.]+ MiB more were asked for with [\d.]+ [MG]iB resident", lines[0]
    )
    assert lines[1].startswith("held by cause: weights ")
    assert lines[2].startswith("held by block, for good: ")
    assert "predicted: a peak of " in lines[3]
    assert "fit" in lines[4]


def test_the_error_says_who_holds_what(tiny_recipes: dict[str, Path]) -> None:
    plan = plan_of(tiny_recipes["gpt"])
    engine = build_engine(plan)
    with pytest.raises(OutOfMemory) as found, memory_explained(plan, engine):
        raise RuntimeError(CPU)
    first, causes, blocks, beside, advice = str(found.value).splitlines()
    assert first.startswith("step 1: out of memory in the forward: 64.00 MiB more were asked for with ")
    weights = 4 * sum(p.numel() for p in engine.model.parameters()) / 2**10
    assert f"weights {weights:.2f} KiB" in causes
    assert "outside of the blocks" in blocks
    assert "blocks.0" in blocks
    assert beside.startswith("predicted: a peak of ")
    assert "fit" in advice
    assert found.value.exit_code == 1
    assert str(found.value.__cause__) == CPU


@pytest.mark.parametrize(("less", "key"), [(2**20, "memory.budget="), (2**23, "")])
def test_the_change_is_one_that_holds_less(
    tiny_recipes: dict[str, Path], monkeypatch: pytest.MonkeyPatch, less: int, key: str
) -> None:
    plan = plan_of(tiny_recipes["gpt"], *LARGE)
    predicted = plan_memory(plan)
    held = (predicted.host_bytes_peak or 0) - less
    monkeypatch.setattr("bigtrain.training.out_of_memory.host_bytes_peak", lambda: held)
    with pytest.raises(OutOfMemory) as found, memory_explained(plan, build_engine(plan)):
        raise RuntimeError("DefaultCPUAllocator: can't allocate memory: you tried to allocate 2048 bytes.")
    start, _, override = str(found.value).splitlines()[-1].rpartition(": ")
    assert start == "the cheapest change that is predicted to fit"
    assert override.startswith(key)
    changed = plan_of(tiny_recipes["gpt"], *LARGE, override)
    assert plan_memory(changed).allocated_bytes_peak <= predicted.allocated_bytes_peak - less


LARGE = ("train.global_batch_size=512", "train.micro_batch_size=512")


def plan_memory(plan: Plan) -> MemoryReport:
    from bigtrain.planner.price import memory_of

    return memory_of(plan.recipe, plan.model, plan.hardware)


def test_other_errors_pass(tiny_recipes: dict[str, Path]) -> None:
    plan = plan_of(tiny_recipes["gpt"])
    engine: Engine = build_engine(plan)
    with pytest.raises(RuntimeError, match="shapes"), memory_explained(plan, engine):
        raise RuntimeError("shapes")
    with memory_explained(plan, engine):
        assert torch.ones(1)


@pytest.mark.parametrize(
    ("held", "requested", "budget"),
    [
        (80, 10, 180),  # less was there than predicted: as much less
        (100, 25, 180),  # a quarter more was needed than predicted: what really fits is predicted at four fifths
        (100, 0, 200),
    ],
)
def test_the_budget_of_the_advice(held: int, requested: int, budget: int) -> None:
    predicted = MemoryReport({"weights": 100}, 150, 200, 300)
    assert fitting_budget_bytes(Exhausted({}, held, requested, "forward", "cuda"), predicted) == budget


def test_a_budget_is_not_negative() -> None:
    predicted = MemoryReport({"weights": 100}, 100, 100, 100)
    assert fitting_budget_bytes(Exhausted({}, 0, 5, "forward", "cuda"), predicted) == 0
