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
from bigtrain.batch import unpad
from bigtrain.config.schema import Recipe
from bigtrain.engine import Engine, find_blocks, place, prepare, schedule_of
from bigtrain.errors import DataError, InputError
from bigtrain.models import build_model
from bigtrain.planner import hardware
from bigtrain.planner.plan import Plan


def tiny_plan(**train: Any) -> Plan:
    recipe = Recipe.model_validate(
        {
            "name": "tiny",
            "model": {"family": "bert", "hidden_size": 32, "num_hidden_layers": 2, "num_attention_heads": 2},
            "data": {"vocab_size": 90, "sequence_length": 16},
            "train": {"objective": "mlm", "steps": 10, "global_batch_size": 8, **train},
            "optimizer": {"learning_rate": 1e-2, "warmup_steps": 2},
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


@pytest.mark.parametrize("value", [math.nan, math.inf])
def test_a_step_that_is_not_finite_changes_nothing(value: float) -> None:
    engine = engine_of(tiny_plan(), torch.optim.AdamW)
    take(engine, rows())
    before, states = weights_of(engine), [s["exp_avg"].clone() for s in engine.optimizer.state.values()]
    for micro in engine.micro_batches(rows()):
        engine.backward(engine.model(**micro) * value)
    result = engine.step()
    assert result.skipped
    assert torch.equal(weights_of(engine), before)
    assert all(torch.equal(s["exp_avg"], old) for s, old in zip(engine.optimizer.state.values(), states, strict=True))
    assert not take(engine, rows()).skipped
    assert engine.steps_taken == 3


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
    engine = prepare(Plain(), dataclasses.replace(tiny_plan(), micro_batch_size=1), sgd)
    shifted = Engine(
        engine.model,
        engine.optimizer,
        micro_batch_size=1,
        shifted_labels=True,
        schedule=lambda _: 1.0,
        device=engine.device,
    )
    batch = {"labels": torch.tensor([[3, -100, -100], [3, 4, 5]])}
    assert len(list(engine.micro_batches(batch))) == 2
    assert len(list(shifted.micro_batches(batch))) == 1


def test_tied_weights_stay_tied_from_the_meta_device() -> None:
    with torch.device("meta"):
        model = Plain()
    place(model, torch.device("cpu"), seed=0)
    assert model.head.weight is model.layers[0].weight
    assert not model.head.weight.is_meta


def test_initial_weights_depend_on_the_seed_alone() -> None:
    models = []
    for seed in (1, 1, 2):
        with torch.device("meta"):
            models.append(Plain())
        place(models[-1], torch.device("cpu"), seed=seed)
    assert torch.equal(models[0].head.weight, models[1].head.weight)
    assert not torch.equal(models[0].head.weight, models[2].head.weight)


def test_a_module_that_cannot_initialise_itself_is_named() -> None:
    class Bare(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.inner = nn.Module()
            self.inner.scale = nn.Parameter(torch.ones(3))

    with torch.device("meta"):
        model = Bare()
    with pytest.raises(InputError, match=r"inner: Module is on the meta device and has no reset_parameters"):
        place(model, torch.device("cpu"), seed=0)


def test_blocks_are_found() -> None:
    model = Plain()
    assert find_blocks(model) == list(model.layers)
    assert find_blocks(model, nn.Linear) == list(model.layers)
    with pytest.raises(InputError, match="no ModuleList of blocks"):
        find_blocks(nn.Linear(2, 2))
    with pytest.raises(InputError, match="no module of class Conv1d"):
        find_blocks(model, nn.Conv1d)


def test_a_length_in_epochs_must_be_counted_first() -> None:
    plan = tiny_plan(steps=None, epochs=2.0)
    with pytest.raises(ValueError, match="with_rows"):
        schedule_of(plan)
    assert plan.with_rows(40).total_steps == 10


def test_buffers_that_nobody_fills_are_refused_by_name() -> None:
    class Positions(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.register_buffer("pos", torch.arange(6))

    with torch.device("meta"):
        model = nn.Sequential(nn.Linear(2, 2), Positions())
    with pytest.raises(InputError, match="1: Positions is on the meta device"):
        place(model, torch.device("cpu"), seed=0)


def test_a_model_that_is_half_on_the_meta_device_is_refused() -> None:
    model = nn.Sequential(nn.Linear(2, 2), nn.Linear(2, 2, device="meta"))
    with pytest.raises(InputError, match="partly on the meta device"):
        place(model, torch.device("cpu"), seed=0)
