"""What steps and checkpoints must do on every device: the same bodies on the CPU and, with `-m gpu`, on CUDA.

Nothing waits inside a step and nothing compiles after the first ones; interrupted runs end as those that were not; a
save takes nothing; what is predicted is what is allocated.
"""

from __future__ import annotations

import gc
from collections.abc import Iterator
from contextlib import contextmanager
from itertools import pairwise
from pathlib import Path
from typing import Any

import pytest
import torch
from on_devices import COMPILED_TOO, COMPILER_WARNS, FAMILIES, MECHANISMS, ON_DEVICES, cases, small
from small_run import changing_rows, deterministic, pass_through, plan_of
from tiny_state import TEXTS, Place, saver_in
from torch._dynamo.utils import counters
from trained import losses, train

from bigtrain.batch import unpad
from bigtrain.checkpoint.state import TrainState
from bigtrain.engine import Engine
from bigtrain.memory.measure import record
from bigtrain.memory.predict import predict
from bigtrain.planner.plan import Plan
from bigtrain.planner.price import workspace_bytes
from bigtrain.static_shapes import StaticShapes
from bigtrain.training.build import build_engine

GROWING_STEP = 1
"""The step whose documents are more than there were places for: each such growth, of which there are few, may compile
anew, so it is one of the first."""

# Inside a step.


@contextmanager
def nothing_waits(device: str) -> Iterator[None]:
    """Have every wait of the host for the GPU be an error."""
    if device == "cuda":
        torch.cuda.synchronize()
        torch.cuda.set_sync_debug_mode("error")
    try:
        yield
    finally:
        if device == "cuda":
            torch.cuda.set_sync_debug_mode("default")


@contextmanager
def nothing_compiles() -> Iterator[None]:
    """Have every new compilation be an error."""
    before = dict(counters["stats"])
    with torch._dynamo.config.patch(error_on_recompile=True):
        yield
    assert dict(counters["stats"]) == before


def changing(plan: Plan, step: int, growing: int = GROWING_STEP) -> dict[str, torch.Tensor]:
    """Return a step's rows, whose documents, padding and labels are others than in the steps beside it."""
    return changing_rows(plan.model.family, step, plan.recipe.data.sequence_length, many=step == growing)


@pytest.mark.parametrize("family", FAMILIES)
def test_the_rows_of_each_step_are_others_and_once_exceed_the_places(family: str) -> None:
    """Or the next two tests would see one shape only. In micro-batches of half the rows, as where they accumulate."""
    plan = plan_of(family, length=256)
    shapes, places, tokens, labels = StaticShapes(), [], [], []
    shapes.documents = 64
    for step in range(8):
        batch = changing(plan, step)
        flats = [unpad({name: rows[half] for name, rows in batch.items()}) for half in (slice(4), slice(4, 8))]
        tokens.append([len(flat["input_ids"]) for flat in flats])
        labels.append([int((flat["labels"] != -100).sum()) for flat in flats])
        counts = (batch["document_lengths"] > 0).sum(1).tolist()
        assert set(counts) <= set(range(1, 6)) or step == GROWING_STEP
        places.append([len(shapes.fill(flat, 4, 256)["cu_seqlens"]) - 1 for flat in flats])
    assert places == [[64, 64], *[[128, 128]] * 7]
    assert all(one != other for found in (tokens, labels) for one, other in pairwise(found))


@pytest.mark.parametrize("name", ["bf16", "accumulated", "split24", "8bit state", "lamb", "muon", "full"])
@COMPILED_TOO
@COMPILER_WARNS
def test_the_host_waits_for_nothing_inside_a_step(name: str, device: str, compiled: bool) -> None:
    """Rows of other documents come each time, once of more than there were places for; what came of them is read after
    the next steps are under way."""
    torch._dynamo.reset()
    growing = GROWING_STEP if compiled else 4
    choices = {**MECHANISMS[name], "precision": "bf16", "compiled": compiled}
    plan = plan_of("gpt", **small(device, **choices))
    engine, results = build_engine(plan), []
    for step in range(3):
        pass_through(engine, plan, step, changing(plan, step, growing))
        engine.step(plan.recipe.train.max_grad_norm)
    batches = [(step, changing(plan, step, growing)) for step in range(3, 6)]
    with nothing_waits(device):
        for step, batch in batches:
            pass_through(engine, plan, step, batch)
            results.append(engine.step(plan.recipe.train.max_grad_norm))
    assert not any(result.skipped for result in results)
    assert all(float(result.loss) > 0 for result in results)


@pytest.mark.parametrize("policy", ["none", "full"])
@pytest.mark.parametrize(("family", "device"), cases(FAMILIES, on_cpu=("bert",)))
@COMPILER_WARNS
def test_nothing_compiles_after_the_first_steps(family: str, device: str, policy: str) -> None:
    """On the CPU nothing compiles at all: the body is tried."""
    torch._dynamo.reset()
    plan = plan_of(family, **small(device, precision="bf16", policy=policy, compiled=device == "cuda"))
    engine = build_engine(plan)
    for step in range(3):
        pass_through(engine, plan, step, changing(plan, step))
        engine.step()
    with nothing_compiles():
        for step in range(3, 8):
            pass_through(engine, plan, step, changing(plan, step))
            engine.step()


# Runs and checkpoints.


class Killed(BaseException):
    """Ends a run where it is."""


@pytest.mark.slow
@COMPILED_TOO
@COMPILER_WARNS
def test_a_killed_run_ends_as_one_that_was_not(
    device: str, compiled: bool, tiny_recipes: dict[str, Path], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Killed in its 9th step, gone on with from the 5th: the same losses and the same weights, bit by bit."""
    keys = [f"train.device={device}", f"train.compile={str(compiled).lower()}", "amp.precision=bf16",
            "optimizer.state=8bit", "amp.master_weights=split24", "cluster.devices_per_node=1"]  # fmt: skip
    plain = Engine.step

    def step(engine: Engine, max_norm: float | None = 1.0) -> Any:
        if engine.steps_taken == 8:
            raise Killed
        return plain(engine, max_norm)

    with deterministic(device):
        right = losses(train(tiny_recipes["gpt"], tmp_path / "right", *keys))
        with monkeypatch.context() as patched, pytest.raises(Killed):
            patched.setattr(Engine, "step", step)
            train(tiny_recipes["gpt"], tmp_path / "killed", *keys)
        found = losses(train(tiny_recipes["gpt"], tmp_path / "killed", *keys))
    assert len(right) == 12
    assert found == right
    files = [tmp_path / run / "step-00000012" / "weights.safetensors" for run in ("right", "killed")]
    assert files[0].read_bytes() == files[1].read_bytes()


def peak_of(device: str, call: Any) -> int:
    """Return the most that a call allocates beyond what is there: on a GPU as its allocator counts."""
    if device == "cpu":
        return record(call).timeline.peak_bytes
    torch.cuda.synchronize()
    torch.cuda.reset_peak_memory_stats()
    before = torch.cuda.memory_allocated()
    call()
    torch.cuda.synchronize()
    return torch.cuda.max_memory_allocated() - before


@ON_DEVICES
@pytest.mark.parametrize("name", ["plain", "all"])
def test_a_checkpoint_takes_nothing_on_the_device(name: str, device: str, tmp_path: Path) -> None:
    """But a flag for each tensor that says whether its numbers are finite."""
    plan = plan_of("gpt", **small(device, **MECHANISMS[name]))
    engine = build_engine(plan)
    pass_through(engine, plan, 0)
    engine.step(plan.recipe.train.max_grad_norm)
    state = TrainState(engine, Place(1), tokens=1)  # type: ignore[arg-type]
    tensors = sum(1 + len(engine.optimizer.state[p]) for p in engine.parameters.values())
    saver = saver_in(tmp_path)
    saved = peak_of(device, lambda: (state.save(saver, TEXTS), saver.require(1)))
    restored = peak_of(device, lambda: state.restore(tmp_path / "step-00000001"))
    if device == "cuda":
        assert saved <= 4 * 512 * tensors
        assert restored <= 4 * 512 * tensors
    assert state.step == 1


# What is predicted.


def full_rows(plan: Plan) -> dict[str, torch.Tensor]:
    """Return rows that a document each fills, with as many labels in each as the objective says."""
    train, length = plan.recipe.train, plan.recipe.data.sequence_length
    labels = ids = torch.randint(5, plan.model.vocab_size, (train.global_batch_size, length))
    if train.objective == "mlm":
        hidden = max(1, round(train.masking_probability * length))
        labels = ids.masked_fill(torch.rand(ids.shape).argsort(1).argsort(1) >= hidden, -100)
    return {"input_ids": ids, "labels": labels, "document_lengths": torch.tensor([[length]] * len(ids))}


def predicted_and_allocated(plan: Plan, device: str) -> tuple[int, int]:
    """Return the peak of a step as it is predicted, and as the allocator counts it in the fourth step."""
    here = plan.hardware
    predicted = predict(
        plan.recipe, plan.model, device=device, slow_bf16=here.slow_bf16, workspace_bytes=workspace_bytes(here)
    ).allocated_bytes_peak
    gc.collect()
    if device == "cuda":
        torch._C._cuda_clearCublasWorkspaces()
        torch.cuda.empty_cache()
    before = torch.cuda.memory_allocated() if device == "cuda" else 0
    engine = build_engine(plan)
    batch = full_rows(plan)
    for step in range(3):
        pass_through(engine, plan, step, batch)
        engine.step(plan.recipe.train.max_grad_norm)
    held = torch.cuda.memory_allocated() - before if device == "cuda" else 0

    def fourth() -> None:
        pass_through(engine, plan, 3, batch)
        engine.step(plan.recipe.train.max_grad_norm)

    return predicted, held + peak_of(device, fourth)


@pytest.mark.parametrize("family", FAMILIES)
@pytest.mark.parametrize(("name", "device"), cases(MECHANISMS, on_cpu=("plain",)))
def test_what_is_predicted_is_allocated(name: str, device: str, family: str) -> None:
    """Within 2%: the priced mechanisms on a GPU; on the CPU, which tests/test_price.py holds, the body is tried."""
    shape = {"length": 512} if device == "cuda" else {}
    plan = plan_of(family, **{**small(device), **shape, **MECHANISMS[name]})
    predicted, allocated = predicted_and_allocated(plan, device)
    assert predicted > 0 and allocated > 0
    if device == "cuda":
        assert predicted == pytest.approx(allocated, rel=0.02)
