"""The same run: what the planner may choose unasked changes no loss and no weight.

Dropout is on wherever a run is compared bit by bit. Micro-batches are the exception: each draws its masks from where
the generator then stands, so another cut meets other masks, as another seed would. They are compared without dropout.
"""

from __future__ import annotations

import os
from functools import cache
from typing import Any, NamedTuple

import pytest
import torch
from torch import Tensor

import bigtrain
from bigtrain.config.schema import Recipe
from bigtrain.errors import RecipeError
from bigtrain.planner import hardware
from bigtrain.planner.plan import Plan
from bigtrain.training.build import build_engine
from bigtrain.training.runtime import seed_step

FAMILIES = ("bert", "gpt", "llama")
MIXED = ("full", "none", "selective")
POLICIES = ("selective", "full", MIXED)
LAYERS, WIDTH, ROWS, LENGTH, VOCABULARY = 3, 32, 8, 16, 90
STEPS, FEW_STEPS = 20, 6
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


class Trace(NamedTuple):
    """What a run leaves: numbers of each step, the first step's gradients, weights and optimizer state at its end."""

    losses: Tensor
    norms: Tensor
    gradients: dict[str, Tensor]
    weights: dict[str, Tensor]
    state: dict[str, Tensor]

    def equals(self, other: Trace) -> bool:
        """Tell whether two runs are bitwise the same, in all that both of them leave."""
        pairs = [(self.weights, other.weights), (self.state, other.state)]
        if self.gradients and other.gradients:
            pairs.append((self.gradients, other.gradients))
        same_tensors = all(
            one.keys() == two.keys() and all(torch.equal(one[name], two[name]) for name in one) for one, two in pairs
        )
        return same_tensors and torch.equal(self.losses, other.losses) and torch.equal(self.norms, other.norms)


def plan_of(
    family: str,
    *,
    policy: str | tuple[str, ...] = "none",
    micro: int = ROWS,
    dropout: float = 0.1,
    precision: str = "fp32",
    master_weights: str = "fp32",
    state: str = "fp32",
    released: bool = False,
    clip: float | None = 1.0,
    width: int = WIDTH,
    length: int = LENGTH,
    compiled: bool = False,
    device: hardware.Hardware | None = None,
    objective: str = "",
) -> Plan:
    """Return the plan of a small run; `released` goes without clipping, as it must."""
    recipe = Recipe.model_validate(
        {
            "name": "same",
            "model": {
                "family": family,
                "hidden_size": width,
                "num_hidden_layers": LAYERS,
                "num_attention_heads": 4,
                "intermediate_size": 5 * width,  # above 4096 elements, the least of which moments are quantized
                **({"num_key_value_heads": 2} if family == "llama" else {}),
            },
            "data": {"vocab_size": VOCABULARY, "sequence_length": length},
            "train": {
                "objective": objective or ("mlm" if family == "bert" else "clm"),
                "steps": STEPS,
                "global_batch_size": ROWS,
                "micro_batch_size": micro,
                "dropout": dropout,
                "attention_dropout": dropout,
                "max_grad_norm": None if released else clip,
                "compile": compiled,
            },
            "optimizer": {
                "learning_rate": 1e-2,
                "warmup_steps": 2,
                "weight_decay": 0.1,
                "state": state,
                "gradient_release": released,
            },
            "amp": {"precision": precision, "master_weights": master_weights},
            "recompute": {"policy": policy if isinstance(policy, str) else list(policy)},
        }
    )
    return bigtrain.plan(recipe, device or hardware.cpu())


def rows(family: str, step: int, length: int = LENGTH) -> dict[str, Tensor]:
    """Packed rows of one or two documents and some padding; label counts differ from row to row."""
    generator = torch.Generator().manual_seed(step)
    # Low numbers are frequent, which there is to learn.
    ids = 5 + (torch.rand(ROWS, length, generator=generator).pow(3) * (VOCABULARY - 5)).long()
    # Few lengths that follow on each other: attention on the CPU goes from one length to the next.
    lengths = torch.tensor([[length - 1, 0]] * (ROWS - 1) + [[9 * length // 16, 6 * length // 16]])
    labels = torch.full_like(ids, -100)
    for row, (first, second) in enumerate(lengths.tolist()):
        if family == "bert":
            labels[row, : 1 + 2 * (row % 4)] = ids[row, : 1 + 2 * (row % 4)]
        else:
            skipped = row % 4
            labels[row, skipped : first - 1] = ids[row, 1 + skipped : first]
            labels[row, first : first + second - 1] = ids[row, first + 1 : first + second]
    return {"input_ids": ids, "labels": labels, "document_lengths": lengths.to(torch.int32)}


def with_pairs(rows: dict[str, Tensor]) -> dict[str, Tensor]:
    """Return rows whose documents are pairs of texts, with a label for each."""
    ids, lengths = rows["input_ids"], rows["document_lengths"]
    segments, labels = torch.arange(ids.shape[1]) % 5 > 2, (ids[:, :2] % 2).masked_fill(lengths == 0, -100)
    return {**rows, "segment_ids": segments.long().repeat(len(ids), 1), "next_sentence_labels": labels}


def follow(plan: Plan, steps: int = STEPS) -> Trace:
    """Train as the shipped loop does."""
    recipe, engine = plan.recipe, build_engine(plan)
    losses, norms, gradients = [], [], {}
    for step in range(steps):
        seed_step(recipe.seed, step)
        batch = rows(plan.model.family, step, recipe.data.sequence_length)
        for micro in engine.micro_batches(with_pairs(batch) if plan.model.next_sentence else batch):
            engine.backward(engine.model(**micro))
        if step == 0:
            gradients = {n: p.grad.clone() for n, p in engine.model.named_parameters() if p.grad is not None}
        result = engine.step(recipe.train.max_grad_norm)
        assert not result.skipped
        losses.append(result.loss)
        norms.append(result.grad_norm)
    weights = {name: p.detach() for name, p in engine.model.named_parameters()}
    state = {
        f"{name}.{key}": value
        for name, p in engine.model.named_parameters()
        for key, value in engine.optimizer.state[p].items()
    }
    return Trace(torch.stack(losses), torch.stack(norms), gradients, weights, state)


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


@pytest.mark.gpu
@pytest.mark.parametrize("precision", ["fp32", "bf16"])
@pytest.mark.parametrize("policy", ["offload", "full", "selective", ("offload", "full", "offload")], ids=str)
@each_family
def test_on_cuda_recompute_and_offload_are_bitwise_none(
    family: str, policy: Any, precision: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Inputs of blocks are above 1 MiB here, the least that is moved."""
    if "CUBLAS_WORKSPACE_CONFIG" not in os.environ:
        monkeypatch.setenv("CUBLAS_WORKSPACE_CONFIG", ":4096:8")
    device = hardware.cuda_devices()
    shape: dict[str, Any] = {"width": 512, "length": 256, "device": device, "precision": precision}
    torch.use_deterministic_algorithms(True)
    try:
        plain, again, moved = (follow(plan_of(family, policy=name, **shape)) for name in ("none", "none", policy))
    finally:
        torch.use_deterministic_algorithms(False)
    assert again.equals(plain), "this device gives other numbers each time"
    assert moved.equals(plain)
