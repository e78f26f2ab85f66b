"""What every device must do, on this machine's CPU always and with `-m gpu` on CUDA: the same bodies on both.

The same runs, with compilation too; the numbers of the CPU. What steps and checkpoints do is in
test_steps_on_devices.py.
"""

from __future__ import annotations

from functools import partial

import pytest
import torch
from on_devices import COMPILER_WARNS, FAMILIES, FEW_STEPS, MECHANISMS, ON_DEVICES, cases, small
from small_run import STEPS, Trace, deterministic, follow, hardware_of, pass_through, plan_of

from bigtrain.amp.rules import device_fault
from bigtrain.models.attention_kernels import OWN, Case, Kernel, _reference, cuda_clock, kernels, try_all
from bigtrain.training.build import build_engine

LOSS_BOUNDS = {"fp32": 1e-4, "low": 1e-2}
"""How far the losses of 6 steps may be from the CPU's in fp32, relatively.

In few bits those of the CPU itself are off by up to 0.0022 in these cases, by 0.0019 for bf16 alone."""

COMPILED_LOSSES, COMPILED_GRADIENTS = 5e-3, 5e-2
"""How far a compiled run in bf16 may be from an eager one: losses of 20 steps, gradients of the first, relatively.

Fused operations keep in fp32 what eager ones round to bf16 (8 bits: 0.4%) after each. On the CPU a GPT is off by
0.00016 and 0.016, a BERT that recomputes by 0.00054 and 0.015; bf16 from fp32, in the sizes that a GPU gets, by 0.0003
and, a BERT whose loss falls to 0.5, by 0.012: so losses may also be off by SMALL, absolutely."""

SMALL = 1e-2

# The same run.


@pytest.mark.parametrize(
    ("family", "policy", "device"),
    [
        pytest.param("gpt", "none", "cpu", marks=pytest.mark.nightly, id="gpt-none-cpu"),
        *(
            pytest.param(family, policy, "cuda", marks=pytest.mark.gpu, id=f"{family}-{policy}-cuda")
            for policy in ("none", "selective", "full", "offload")
            for family in FAMILIES
        ),
    ],
)
@COMPILER_WARNS
def test_compiled_is_eager_within_the_bound(family: str, policy: str, device: str) -> None:
    """Without dropout, since compiled dropout draws other numbers."""
    torch._dynamo.reset()
    run = partial(plan_of, family, **small(device, dropout=0.0, precision="bf16"))
    with deterministic(device):
        eager, compiled = follow(run()), follow(run(policy=policy, compiled=True))
    assert_near(compiled, eager, COMPILED_LOSSES, COMPILED_GRADIENTS)


def assert_near(found: Trace, expected: Trace, of_losses: float, of_gradients: float) -> None:
    torch.testing.assert_close(found.losses.cpu(), expected.losses.cpu(), rtol=of_losses, atol=SMALL)
    for name, gradient in expected.gradients.items():
        difference = torch.linalg.vector_norm(found.gradients[name].float() - gradient.float())
        assert difference <= of_gradients * torch.linalg.vector_norm(gradient.float()), name


@pytest.mark.gpu
@pytest.mark.parametrize("compiled", [False, True])
@pytest.mark.parametrize("family", FAMILIES)
@COMPILER_WARNS
def test_on_cuda_twice_the_same_is_bitwise_the_same(family: str, compiled: bool) -> None:
    plan = plan_of(family, **small("cuda", precision="bf16", compiled=compiled))
    with deterministic("cuda"):
        assert follow(plan, FEW_STEPS).equals(follow(plan, FEW_STEPS))


@pytest.mark.parametrize(
    ("name", "device"),
    cases(("plain", "bf16", "split24", "8bit state", "4bit state", "adafactor"), on_cpu=("8bit state",)),
)
def test_gradient_release_is_bitwise_the_update_after_backward(name: str, device: str) -> None:
    choices = {**small(device), **MECHANISMS[name], "clip": None}
    with deterministic(device):
        released, kept = (follow(plan_of("gpt", **choices, released=on), FEW_STEPS) for on in (True, False))
    assert not released.gradients and kept.gradients
    assert released._replace(norms=kept.norms).equals(kept)


@pytest.mark.parametrize(("offload", "device"), cases(("optimizer", "all"), on_cpu=("none",)))
@pytest.mark.parametrize("state", ["fp32", "8bit"])
def test_states_on_the_host_change_nothing(offload: str, device: str, state: str) -> None:
    choices = small(device, precision="bf16", master_weights="split24", state=state)
    with deterministic(device):
        here, there = (
            follow(plan_of("bert", **choices, sharding={"offload": where}), FEW_STEPS) for where in ("none", offload)
        )
    assert torch.equal(here.losses, there.losses)
    assert all(torch.equal(weight.cpu(), there.weights[name].cpu()) for name, weight in here.weights.items())


# The CPU's numbers.


@pytest.mark.parametrize(("name", "device"), cases(MECHANISMS, on_cpu=("muon", "all")))
def test_losses_are_the_cpus(name: str, device: str) -> None:
    """Against fp32, eager, with nothing recomputed: the same mathematics in other numbers."""
    family = FAMILIES[list(MECHANISMS).index(name) % 3]
    choices = {"dropout": 0.0, "width": 64, "length": 32, **MECHANISMS[name]}
    reference = {"dropout": 0.0, "width": 64, "length": 32, "optimizer": choices.get("optimizer", "adamw")}
    if choices.get("released") or choices.get("clip", 1.0) is None:
        reference["clip"] = None
    found = follow(plan_of(family, **choices, device=hardware_of(device)), FEW_STEPS)
    right = follow(plan_of(family, **reference), FEW_STEPS)
    low = choices.get("precision") == "bf16" or choices.get("state", "fp32") != "fp32"
    bound = LOSS_BOUNDS["low" if low else "fp32"]
    torch.testing.assert_close(found.losses.cpu(), right.losses, rtol=bound, atol=0)


@ON_DEVICES
def test_fp8_learns_what_bf16_does(device: str) -> None:
    """On the CPU, which has none, bf16 stands in for it."""
    here = hardware_of(device)
    fault = device_fault("fp8", here.kind, here.capability)
    if device == "cuda" and fault:
        pytest.skip(fault)
    narrow = "fp8" if device == "cuda" else "bf16"
    runs = (follow(plan_of("gpt", **small(device, dropout=0.0, precision=name))) for name in (narrow, "bf16"))
    found, right = (trace.losses.cpu() for trace in runs)
    assert found.isfinite().all() and found[-5:].mean() < found[0] - 0.3
    torch.testing.assert_close(found, right, rtol=0.1, atol=0.05)


@ON_DEVICES
def test_the_loss_in_chunks_is_the_loss_at_once(device: str) -> None:
    traces = []
    for chunk in (None, 24):
        plan = plan_of("gpt", **small(device, dropout=0.0))
        engine = build_engine(plan)
        engine.model.loss_chunk_tokens = chunk or 10**6
        pass_through(engine, plan, 0)
        gradients = {name: p.grad for name, p in engine.model.named_parameters() if p.grad is not None}
        traces.append((engine.step().loss, gradients))
    (loss, gradients), (in_chunks, others) = traces
    torch.testing.assert_close(in_chunks, loss, rtol=1e-6, atol=0)
    for name, gradient in gradients.items():
        torch.testing.assert_close(others[name], gradient, rtol=1e-4, atol=1e-6)


@ON_DEVICES
@pytest.mark.parametrize("causal", [True, False])
def test_the_attention_kernels_that_are_here_are_right_and_timed(device: str, causal: bool) -> None:
    """On the CPU, where there is none, the path by document stands in for them."""
    here = [Kernel(OWN, lambda: _reference)] if device == "cpu" else kernels()
    clock = cuda_clock if device == "cuda" else lambda run: 0.0 if run() is None else 1.0
    case = Case([129, 64, 64, 255, 1], (8, 4), 64, causal, torch.bfloat16, torch.device(device))
    found = try_all(case, clock, here)
    print("\n".join(map(str, found)))
    assert found[0].name == OWN and not found[0].fault
    assert all(one.seconds or one.fault for one in found)


def test_the_steps_are_those_of_the_same_run() -> None:
    """Or bounds over 20 steps would say less than they seem to."""
    assert STEPS == 20
