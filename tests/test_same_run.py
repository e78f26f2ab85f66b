"""The same run: what the planner may choose unasked changes no loss and no weight.

Dropout is on wherever a run is compared bit by bit. Micro-batches are the exception: each draws its masks from where
the generator then stands, so another cut meets other masks, as another seed would. They are compared without dropout.
"""

from __future__ import annotations

from functools import cache
from typing import Any

import pytest
import torch
from small_run import ROWS, STEPS, Trace, deterministic, follow, hardware_of, plan_of, rows

from bigtrain.errors import RecipeError

FAMILIES = ("bert", "gpt", "llama")
MIXED = ("full", "none", "selective")
POLICIES = ("selective", "full", MIXED)
FEW_STEPS = 6
EXACT: dict[str, Any] = {"precision": "fp32", "master_weights": "fp32", "state": "fp32"}
NIGHTLY = pytest.mark.nightly
LEAN: dict[str, Any] = {"precision": "bf16", "master_weights": "split24", "state": "8bit"}

COMPILED = [
    pytest.param(family, policy, marks=() if (family, policy) in {("gpt", "none"), ("llama", "full")} else NIGHTLY)
    for family in FAMILIES
    for policy in ("none", "full")
]
"""Compiling takes most of a minute each time: both policies are run always, every family and policy nightly."""

each_family = pytest.mark.parametrize("family", FAMILIES)
each_policy = pytest.mark.parametrize("policy", POLICIES, ids=str)


@cache
def run(family: str, steps: int = STEPS, **choices: Any) -> Trace:
    """Return the trace of a run with these choices; each is made once."""
    return follow(plan_of(family, **choices), steps)


def test_the_rows_are_what_the_comparisons_need() -> None:
    """Enough to learn from, uneven enough that a micro-batch weighted wrongly would show."""
    for family in FAMILIES:
        counts = [(rows(family, step)["labels"] != -100).sum(1) for step in range(3)]
        assert all(len(set(count.tolist())) > 1 for count in counts)
        losses = run(family).losses
        assert losses.isfinite().all() and losses[-5:].mean() < losses[0]


@each_family
def test_dropout_draws(family: str) -> None:
    """Or the comparisons below would not see whether a generator is put back."""
    assert not torch.equal(run(family).losses, run(family, dropout=0.0).losses)


@each_policy
@each_family
def test_recompute_is_bitwise_none(family: str, policy: Any) -> None:
    assert run(family, policy=policy).equals(run(family))


@each_family
def test_recompute_is_bitwise_none_with_gradient_accumulation(family: str) -> None:
    assert run(family, policy=MIXED, micro=4).equals(run(family, micro=4))


@each_policy
@each_family
def test_recompute_is_bitwise_none_in_bf16(family: str, policy: Any) -> None:
    """The same operations on the same numbers: the second run rounds where the first did."""
    plain, other = (run(family, FEW_STEPS, policy=name, precision="bf16") for name in ("none", policy))
    assert other.equals(plain)


@each_policy
@each_family
def test_recompute_is_bitwise_none_in_few_bits(family: str, policy: Any) -> None:
    plain, other = (run(family, FEW_STEPS, policy=name, clip=None, **LEAN) for name in ("none", policy))
    assert other.equals(plain)


@pytest.mark.parametrize("micro", [1, 2, 4])
@each_family
def test_the_micro_batch_changes_no_more_than_the_order_of_sums(family: str, micro: int) -> None:
    check_but_for_the_order_of_sums(run(family, dropout=0.0, micro=micro), run(family, dropout=0.0))


def check_but_for_the_order_of_sums(cut: Trace, whole: Trace, relative: float = 1e-6) -> None:
    torch.testing.assert_close(cut.losses, whole.losses, rtol=relative, atol=0)
    for name, expected in whole.gradients.items():
        difference = torch.linalg.vector_norm(cut.gradients[name] - expected)
        assert difference <= 1e-5 * torch.linalg.vector_norm(expected), name


@each_policy
def test_with_pairs_recompute_is_bitwise_none(policy: Any) -> None:
    plain = run("bert", FEW_STEPS, objective="mlm_nsp")
    assert run("bert", FEW_STEPS, objective="mlm_nsp", policy=policy).equals(plain)
    assert not torch.equal(plain.losses, run("bert", FEW_STEPS).losses)


@pytest.mark.parametrize("micro", [1, 4])
def test_with_pairs_the_micro_batch_changes_no_more_than_the_order_of_sums(micro: int) -> None:
    cut, whole = (run("bert", objective="mlm_nsp", dropout=0.0, micro=rows) for rows in (micro, ROWS))
    check_but_for_the_order_of_sums(cut, whole)


def test_with_pairs_gradient_release_is_bitwise_the_update_after_backward() -> None:
    released, kept = (run("bert", FEW_STEPS, objective="mlm_nsp", released=on, clip=None) for on in (True, False))
    assert released._replace(norms=kept.norms).equals(kept) and not released.gradients


@pytest.mark.parametrize("formats", [EXACT, LEAN], ids=["exact", "lean"])
@pytest.mark.parametrize("policy", ["none", MIXED], ids=str)
@each_family
def test_gradient_release_is_bitwise_the_update_after_backward(family: str, policy: Any, formats: Any) -> None:
    steps = STEPS if formats is EXACT else FEW_STEPS
    released, kept = (run(family, steps, policy=policy, released=on, clip=None, **formats) for on in (True, False))
    assert not released.gradients and kept.gradients
    assert released._replace(norms=kept.norms).equals(kept)
    # A norm is only reported here; that of a bf16 gradient is summed in other pieces.
    torch.testing.assert_close(released.norms, kept.norms, rtol=1e-6, atol=0)


def test_few_bits_are_in_use() -> None:
    """Or the comparisons in few bits would be those in fp32 once more."""
    trace = run("bert", FEW_STEPS, clip=None, **LEAN)
    assert {weight.dtype for weight in trace.weights.values()} == {torch.bfloat16}
    kinds = {name.rpartition(".")[2]: value.dtype for name, value in trace.state.items() if "mlp.up.weight" in name}
    assert (kinds["exp_avg"], kinds["exp_avg_sq"], kinds["remainder"]) == (torch.int8, torch.uint8, torch.int8)


@pytest.mark.parametrize("policy", ["offload", ("none", "none", "offload")], ids=str)
def test_offload_on_the_cpu_is_refused(policy: Any) -> None:
    with pytest.raises(RecipeError, match="offload on the CPU: the host memory is the device memory there; use full"):
        plan_of("bert", policy=policy)


@pytest.mark.filterwarnings("ignore")  # the compiler warns of what it does itself
@pytest.mark.slow
@pytest.mark.parametrize(("family", "policy"), COMPILED)
def test_compiled_blocks_are_eager_ones_but_for_rounding(family: str, policy: Any) -> None:
    """Without dropout, since compiled dropout draws other numbers."""
    torch._dynamo.reset()
    eager, compiled = run(family, dropout=0.0), run(family, dropout=0.0, policy=policy, compiled=True)
    check_but_for_the_order_of_sums(compiled, eager, relative=1e-5)


@pytest.mark.parametrize(
    ("policy", "precision", "device"),
    [
        ("full", "bf16", "cpu"),
        *(
            pytest.param(policy, precision, "cuda", marks=pytest.mark.gpu)
            for policy in ("offload", "full", "selective", ("offload", "full", "offload"))
            for precision in ("fp32", "bf16")
        ),
    ],
    ids=str,
)
@each_family
def test_on_a_device_recompute_and_offload_are_bitwise_none(
    family: str, policy: Any, precision: str, device: str
) -> None:
    """Inputs of blocks are above 1 MiB on CUDA, the least that is moved."""
    shape: dict[str, Any] = {"width": 512, "length": 256} if device == "cuda" else {}
    choices = {**shape, "device": hardware_of(device), "precision": precision}
    steps = STEPS if device == "cuda" else 2
    with deterministic(device):
        plain, again, moved = (
            follow(plan_of(family, policy=name, **choices), steps) for name in ("none", "none", policy)
        )
    assert again.equals(plain), "this device gives other numbers each time"
    assert moved.equals(plain)
