"""The engine: any module, weights by labelled tokens, micro-batches that change nothing, meta-device initialisation."""

from __future__ import annotations

import dataclasses
import math
from collections.abc import Iterable
from functools import partial
from typing import Any

import pytest
import torch
from torch import Tensor, nn

import bigtrain
from bigtrain.amp.loss_scale import LossScale
from bigtrain.batch import unpad
from bigtrain.config.schema import Recipe
from bigtrain.engine import Engine, compiled_as, prepare, schedule_of
from bigtrain.errors import DataError, InputError, NonFiniteGradient
from bigtrain.memory.measure import measure
from bigtrain.models import build_model
from bigtrain.optim import build_optimizer
from bigtrain.planner import hardware
from bigtrain.planner.plan import Plan


def tiny_plan(
    *, amp: dict[str, Any] | None = None, optimizer: dict[str, Any] | None = None, policy: Any = "auto", **train: Any
) -> Plan:
    recipe = Recipe.model_validate(
        {
            "name": "tiny",
            "model": {"family": "bert", "hidden_size": 32, "num_hidden_layers": 2, "num_attention_heads": 2},
            "data": {"vocab_size": 90, "sequence_length": 16},
            "train": {"objective": "mlm", "steps": 10, "global_batch_size": 8, **train},
            "optimizer": {"learning_rate": 1e-2, "warmup_steps": 2, **(optimizer or {})},
            "amp": amp or {},
            "recompute": {"policy": policy},
        }
    )
    return bigtrain.plan(recipe, hardware.cpu())


def rows(seed: int = 0, *, count: int = 8) -> dict[str, Tensor]:
    """Packed rows of two documents, with label counts that differ from row to row."""
    generator = torch.Generator().manual_seed(seed)
    ids = torch.randint(5, 90, (count, 16), generator=generator)
    labels = torch.full_like(ids, -100)
    for row in range(count):
        labels[row, : 1 + 2 * (row % 4)] = ids[row, : 1 + 2 * (row % 4)]
    return {"input_ids": ids, "labels": labels, "document_lengths": torch.tensor([[9, 6]] * count, dtype=torch.int32)}


def sgd(parameters: Iterable[nn.Parameter]) -> torch.optim.Optimizer:
    return torch.optim.SGD(parameters, lr=0.1)


def its_own(plan: Plan) -> Any:
    """Return the factory of the optimizer that a plan names."""
    return partial(build_optimizer, section=plan.recipe.optimizer, master_weights=plan.recipe.amp.master_weights)


def engine_of(plan: Plan, optimizer: Any = sgd) -> Engine:
    with torch.device("meta"):
        model = build_model(plan.model)
    return prepare(model, plan, optimizer)


def take(engine: Engine, batch: dict[str, Tensor], max_norm: float | None = None) -> Any:
    for micro in engine.micro_batches(batch):
        engine.backward(engine.model(**micro))
    return engine.step(max_norm)


def weights_of(engine: Engine) -> Tensor:
    return torch.cat([p.detach().flatten() for p in engine.model.parameters()])


def everything_of(engine: Engine) -> list[Tensor]:
    """Return a copy of all that a step may change, as tensors."""
    states = [engine.optimizer.state[p] for p in engine.model.parameters()]
    held = [torch.as_tensor(state[key]).clone() for state in states for key in sorted(state)]
    return [weights_of(engine), *(p.detach().clone() for p in engine.model.parameters()), *held]


def same(one: list[Tensor], other: list[Tensor]) -> bool:
    return all(torch.equal(mine, theirs) for mine, theirs in zip(one, other, strict=True))


def backward(engine: Engine, batch: dict[str, Tensor], factor: float = 1.0) -> None:
    for micro in engine.micro_batches(batch):
        engine.backward(engine.model(**micro) * factor)


def spoil_gradient(engine: Engine, value: float) -> Any:
    """Make one gradient non-finite, though the loss is finite; return the hook."""
    return next(engine.model.parameters()).register_hook(lambda gradient: gradient * value)


@pytest.mark.parametrize("micro", [1, 2, 4])
def test_the_micro_batch_does_not_change_the_mathematics(micro: int) -> None:
    whole, cut = engine_of(tiny_plan(micro_batch_size=8)), engine_of(tiny_plan(micro_batch_size=micro))
    for seed in range(3):
        one, other = take(whole, rows(seed)), take(cut, rows(seed))
        assert float(one.loss) == pytest.approx(float(other.loss), rel=1e-6)
        assert float(one.grad_norm) == pytest.approx(float(other.grad_norm), rel=1e-5)
    torch.testing.assert_close(weights_of(whole), weights_of(cut), rtol=1e-4, atol=1e-6)


def test_the_loss_is_the_mean_over_all_labelled_tokens() -> None:
    engine = engine_of(tiny_plan(micro_batch_size=2))
    batch = rows()
    expected = engine.model(**unpad(batch)).item()
    assert float(take(engine, batch).loss) == pytest.approx(expected, rel=1e-6)


def test_the_same_steps_twice_are_bitwise_the_same() -> None:
    engines = [engine_of(tiny_plan(micro_batch_size=4)) for _ in range(2)]
    results = [[float(take(engine, rows(seed)).loss) for seed in range(3)] for engine in engines]
    assert results[0] == results[1]
    assert torch.equal(weights_of(engines[0]), weights_of(engines[1]))


def test_micro_batches_without_labels_are_left_out() -> None:
    batch = rows()
    batch["labels"][2:4] = -100
    engine = engine_of(tiny_plan(micro_batch_size=2))
    assert len(list(engine.micro_batches(batch))) == 3
    assert math.isfinite(float(take(engine, batch).loss))


def test_a_batch_without_any_label_is_refused() -> None:
    batch = rows()
    batch["labels"][:] = -100
    with pytest.raises(DataError, match="no label that counts"):
        next(engine_of(tiny_plan()).micro_batches(batch))


def test_clipping_bounds_what_a_step_changes() -> None:
    free, clipped = engine_of(tiny_plan()), engine_of(tiny_plan())
    before = weights_of(free)
    assert float(take(free, rows(), None).grad_norm) == float(take(clipped, rows(), 1e-3).grad_norm)
    rate = clipped.optimizer.param_groups[0]["lr"]
    assert (weights_of(clipped) - before).norm() <= 1e-3 * rate * 1.001
    assert (weights_of(free) - before).norm() > 1e-3 * rate


LEAN = {"amp": {"precision": "bf16", "master_weights": "split24"}, "optimizer": {"state": "8bit"}}
RELEASED = {"max_grad_norm": None, "micro_batch_size": 8}


def lean_plan(**optimizer: Any) -> Plan:
    return tiny_plan(amp=LEAN["amp"], optimizer={**LEAN["optimizer"], **optimizer}, **RELEASED)


def released_plan(**sections: Any) -> Plan:
    return tiny_plan(optimizer={"gradient_release": True}, **RELEASED, **sections)


@pytest.mark.parametrize("value", [math.nan, math.inf])
@pytest.mark.parametrize("place", ["loss", "gradient"])
@pytest.mark.parametrize("kind", ["torch", "plain", "lean"])
def test_a_step_that_is_not_finite_changes_nothing(value: float, place: str, kind: str) -> None:
    plan = lean_plan() if kind == "lean" else tiny_plan()
    engine = engine_of(plan, torch.optim.AdamW if kind == "torch" else its_own(plan))
    take(engine, rows())
    before = everything_of(engine)
    if place == "loss":
        backward(engine, rows(), value)
    else:
        hook = spoil_gradient(engine, value)
        backward(engine, rows())
        hook.remove()
    result = engine.step()
    assert result.skipped
    assert math.isfinite(result.loss) == (place == "gradient")
    assert same(everything_of(engine), before)
    assert all(p.grad is None for p in engine.model.parameters())
    assert not take(engine, rows()).skipped
    assert not same(everything_of(engine), before)
    assert engine.steps_taken == 3


def scaled_engine() -> Engine:
    """Return an engine of a model in fp32 that scales its loss as fp16 does."""
    plan = tiny_plan()
    engine = engine_of(plan, its_own(plan))
    engine.loss_scale = LossScale(engine.device, precision="fp16")
    return engine


def test_an_overflow_skips_the_step_and_halves_the_scale() -> None:
    engine = scaled_engine()
    assert not take(engine, rows()).skipped
    before, start = everything_of(engine), float(engine.loss_scale.value)
    backward(engine, rows(), 1e36)  # finite, but not once it is scaled
    result = engine.step()
    assert result.skipped
    assert math.isfinite(result.loss)
    assert float(result.loss_scale) == start
    assert float(engine.loss_scale.value) == start / 2
    assert same(everything_of(engine), before)
    after = take(engine, rows())
    assert not after.skipped
    assert float(after.loss_scale) == start / 2


def test_a_scale_that_is_a_power_of_two_changes_no_bit() -> None:
    plain, scaled = engine_of(tiny_plan(), its_own(tiny_plan())), scaled_engine()
    for seed in range(4):
        one, other = take(plain, rows(seed), 1.0), take(scaled, rows(seed), 1.0)
        assert torch.equal(one.loss, other.loss)
        assert torch.equal(one.grad_norm, other.grad_norm)
        assert (float(one.loss_scale), float(other.loss_scale)) == (1.0, 2.0**16)
    assert same(everything_of(plain), everything_of(scaled))


@pytest.mark.parametrize("lean", [False, True])
def test_gradient_release_changes_no_bit(lean: bool) -> None:
    plans = [lean_plan(gradient_release=on) if lean else tiny_plan(optimizer={"gradient_release": on}, **RELEASED)
             for on in (False, True)]  # fmt: skip
    kept, released = (engine_of(plan, its_own(plan)) for plan in plans)
    for seed in range(10):
        one, other = take(kept, rows(seed)), take(released, rows(seed))
        assert torch.equal(one.loss, other.loss)
        assert float(one.grad_norm) == pytest.approx(float(other.grad_norm), rel=1e-6)
        assert one.learning_rate == other.learning_rate
        assert all(p.grad is None for p in released.model.parameters())
    assert same(everything_of(kept), everything_of(released))
    if lean:
        held = {tensor.dtype for tensor in everything_of(released)}
        assert {torch.bfloat16, torch.int8} <= held or {torch.bfloat16, torch.uint8} <= held


def test_gradient_release_with_an_optimizer_of_torch() -> None:
    plans = [tiny_plan(optimizer={"gradient_release": on}, **RELEASED) for on in (False, True)]
    kept, released = (engine_of(plan, partial(torch.optim.AdamW, lr=1e-2)) for plan in plans)
    for seed in range(3):
        assert torch.equal(take(kept, rows(seed)).loss, take(released, rows(seed)).loss)
    assert same(everything_of(kept), everything_of(released))


@pytest.mark.parametrize("value", [math.nan, math.inf])
def test_with_release_a_loss_that_is_not_finite_changes_nothing(value: float) -> None:
    plan = released_plan()
    engine = engine_of(plan, its_own(plan))
    take(engine, rows())
    before = everything_of(engine)
    backward(engine, rows(), value)
    assert engine.step(None).skipped
    assert same(everything_of(engine), before)
    assert not take(engine, rows()).skipped
    assert engine.steps_taken == 3


def test_with_release_a_gradient_that_is_not_finite_is_an_error() -> None:
    plan = released_plan()
    engine = engine_of(plan, its_own(plan))
    take(engine, rows())
    hook = spoil_gradient(engine, math.nan)
    backward(engine, rows())
    hook.remove()
    with pytest.raises(NonFiniteGradient, match=r"^step 2: a gradient was not finite, .*gradient_release=false"):
        engine.step(None)
    assert weights_of(engine).isfinite().all()


def test_release_refuses_a_norm_to_clip_to() -> None:
    engine = engine_of(released_plan())
    backward(engine, rows())
    with pytest.raises(InputError, match=r"^a global norm of 1 with gradient release: clipping needs .*max_grad_norm"):
        engine.step()


@pytest.mark.parametrize("kept", ["split24", "none"])
def test_an_optimizer_that_keeps_no_master_weights_is_refused(kept: str) -> None:
    plan = tiny_plan(amp={"precision": "bf16", "master_weights": kept})
    with pytest.raises(InputError, match=rf"^amp.master_weights: SGD cannot keep {kept}; use bigtrain.optim, or fp32$"):
        engine_of(plan)


def test_bf16_with_weights_in_fp32_goes_with_any_optimizer() -> None:
    engine = engine_of(tiny_plan(amp={"precision": "bf16"}, micro_batch_size=4))
    first = take(engine, rows())
    assert {p.dtype for p in engine.model.parameters()} == {torch.float32}
    assert math.isfinite(first.loss)


def test_gradients_of_several_micro_batches_are_added_in_fp32() -> None:
    plan = tiny_plan(**LEAN, micro_batch_size=2)
    engine = engine_of(plan, its_own(plan))
    backward(engine, rows())
    assert {p.grad.dtype for p in engine.model.parameters() if p.grad is not None} == {torch.float32}
    assert {p.dtype for p in engine.model.parameters()} == {torch.bfloat16}


@pytest.mark.parametrize("policy", ["full", "selective", ["none", "full"]])
@pytest.mark.parametrize("precision", ["fp32", "bf16"])
def test_recompute_changes_no_bit(policy: Any, precision: str) -> None:
    plans = [tiny_plan(policy=choice, amp={"precision": precision}) for choice in ("none", policy)]
    kept, again = (engine_of(plan, its_own(plan)) for plan in plans)
    for seed in range(3):
        assert torch.equal(take(kept, rows(seed), 1.0).loss, take(again, rows(seed), 1.0).loss)
    assert same(everything_of(kept), everything_of(again))


def test_a_policy_list_of_another_length_than_a_users_model_has_blocks() -> None:
    with pytest.raises(InputError, match=r"recompute.policy: a list of 2 for 3 blocks"):
        prepare(Plain(), tiny_plan(policy=["full", "none"]), sgd)


def test_a_users_model_without_blocks_is_refused_where_the_plan_needs_them() -> None:
    with pytest.raises(InputError, match="no ModuleList of blocks"):
        prepare(nn.Linear(4, 4), tiny_plan(policy="full"), sgd)
    assert prepare(nn.Linear(4, 4), tiny_plan(), sgd).steps_taken == 0


@pytest.mark.slow
@pytest.mark.filterwarnings("ignore")  # the compiler warns of what it does itself
@pytest.mark.parametrize("policy", ["none", "full"])
def test_compiled_blocks_train_as_eager_ones(policy: str) -> None:
    eager, compiled = (engine_of(plan, its_own(plan)) for plan in (tiny_plan(), tiny_plan(policy=policy, compile=True)))
    for seed in range(2):
        one, other = take(eager, rows(seed), 1.0), take(compiled, rows(seed), 1.0)
        assert float(one.loss) == pytest.approx(float(other.loss), rel=1e-5)
        assert float(one.grad_norm) == pytest.approx(float(other.grad_norm), rel=1e-4)
    assert [*dict(eager.model.named_parameters())] == [*dict(compiled.model.named_parameters())]


@pytest.mark.parametrize(
    ("capability", "precision", "attention_dropout", "found"),
    [
        ((9, 0), "bf16", 0.0, "whole"),
        ((9, 0), "fp32", 0.0, "parts"),
        ((7, 5), "fp16", 0.0, "parts"),
        ((9, 0), "bf16", 0.1, "parts"),
    ],
)
def test_what_is_compiled_as_one_graph(
    capability: tuple[int, int], precision: str, attention_dropout: float, found: str
) -> None:
    device = hardware.Hardware("cuda", "a GPU", 1, 2**50, capability=capability)  # more than any CPU that runs this
    recipe = tiny_plan(attention_dropout=attention_dropout).recipe
    amp = recipe.amp.model_copy(update={"precision": precision})
    train = recipe.train.model_copy(update={"device": "cuda", "compile": True})
    plan = bigtrain.plan(recipe.model_copy(update={"amp": amp, "train": train}), device)
    assert compiled_as(plan) == found
    assert compiled_as(tiny_plan()) == "parts"


def test_the_learning_rate_follows_the_schedule() -> None:
    plan = tiny_plan()
    engine = engine_of(plan)
    rates = [take(engine, rows()).learning_rate for _ in range(10)]
    factors = [schedule_of(plan)(step) for step in range(10)]
    assert rates == [0.1 * factor for factor in factors]
    assert rates[0] == pytest.approx(0.05)


def test_gradients_are_cleared() -> None:
    engine = engine_of(tiny_plan())
    take(engine, rows())
    assert all(p.grad is None for p in engine.model.parameters())


class Plain(nn.Module):
    """A model of a user: padded rows in, an output with a loss out."""

    def __init__(self) -> None:
        super().__init__()
        self.layers = nn.ModuleList(nn.Linear(4, 4) for _ in range(3))
        self.head = self.layers[0]

    def forward(self, x: Tensor, y: Tensor) -> Any:
        out = x
        for layer in self.layers:
            out = layer(out).tanh()
        return dataclasses.make_dataclass("Output", ["loss"])((out - y).square().mean())


def test_any_module_and_any_batch() -> None:
    plan = tiny_plan(micro_batch_size=2)
    engine = prepare(Plain(), plan, partial(torch.optim.AdamW, lr=1e-2))
    torch.manual_seed(0)
    batch = {"x": torch.randn(8, 4), "y": torch.rand(8, 4)}
    losses = []
    for _ in range(20):
        for micro in engine.micro_batches(batch):
            assert micro["x"].shape == (2, 4)
            engine.backward(engine.model(**micro))
        losses.append(float(engine.step().loss))
    assert losses[-1] < losses[0]


def test_labels_of_a_causal_model_count_after_its_own_shift() -> None:
    engine = prepare(Plain(), tiny_plan(micro_batch_size=1), sgd)
    shifted = Engine(
        engine.model,
        engine.optimizer,
        micro_batch_size=1,
        shifted_labels=True,
        schedule=lambda _: 1.0,
        loss_scale=LossScale(engine.device, precision="fp32"),
    )
    batch = {"labels": torch.tensor([[3, -100, -100], [3, 4, 5]])}
    assert len(list(engine.micro_batches(batch))) == 2
    assert len(list(shifted.micro_batches(batch))) == 1


@pytest.mark.parametrize("kept", ["split24", "none"])
def test_a_low_precision_model_is_never_there_in_fp32(kept: str) -> None:
    """States come with the first update, so what is held before is weights: no more of them than later."""
    plan = tiny_plan(amp={"precision": "bf16", "master_weights": kept}, optimizer={"state": "4bit"})
    with torch.device("meta"):
        model = build_model(dataclasses.replace(plan.model, vocab_size=2000, num_hidden_layers=8))
    sizes = [parameter.numel() for parameter in model.parameters()]
    peak = measure(lambda: prepare(model, plan, its_own(plan))).peak_bytes
    assert sum(parameter.nbytes for parameter in model.parameters()) == 2 * sum(sizes)
    assert peak <= 2 * sum(sizes) + 4 * max(sizes) + 4096 < 4 * sum(sizes)


def test_a_length_in_epochs_must_be_counted_first() -> None:
    plan = tiny_plan(steps=None, epochs=2.0)
    with pytest.raises(ValueError, match="with_rows"):
        schedule_of(plan)
    assert plan.with_rows(40).total_steps == 10
