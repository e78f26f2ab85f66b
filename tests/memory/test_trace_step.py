"""A traced step against a real one: the same peak, and what it is made of."""

from __future__ import annotations

from collections.abc import Callable, Iterable
from functools import partial
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch.optim import Optimizer

from bigtrain import recompute
from bigtrain.memory.attribute import causes_at_peak
from bigtrain.memory.measure import measure
from bigtrain.memory.predict import FIRST_STEP, SECOND_STEP
from bigtrain.memory.record import Recording
from bigtrain.memory.trace import as_fake, fake_like, fakes
from bigtrain.memory.trace_step import Run, trace_step, trace_update

ROWS, WIDTH, BLOCKS = 64, 32, 3
SLACK_BYTES = 512
"""Scalars: the optimizer's step counts, the loss."""

Factory = Callable[[Iterable[nn.Parameter]], Optimizer]
ADAMW: list[Factory] = [
    partial(torch.optim.AdamW, fused=True),
    partial(torch.optim.AdamW, foreach=True),
    partial(torch.optim.AdamW, foreach=False),
]


class Block(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.up, self.down = nn.Linear(WIDTH, 4 * WIDTH), nn.Linear(4 * WIDTH, WIDTH)

    def forward(self, x: Tensor) -> Tensor:
        return x + self.down(nn.functional.gelu(self.up(x)))


class Net(nn.Module):
    def __init__(self, *, idle: bool = False) -> None:
        super().__init__()
        self.blocks = nn.ModuleList(Block() for _ in range(BLOCKS))
        self.idle = nn.Linear(8 * WIDTH, 8 * WIDTH) if idle else None

    def forward(self, x: Tensor) -> Tensor:
        for block in self.blocks:
            x = block(x)
        return x.square().mean()


def run_of(model: nn.Module, optimizer: Optimizer, x: Tensor, *, accumulated: bool = False) -> Run:
    def update() -> None:
        optimizer.step()
        optimizer.zero_grad()

    return Run(
        model=model,
        optimizer=optimizer,
        forward=lambda: model(x),
        backward=torch.autograd.backward,
        update=update,
        accumulated=accumulated,
        blocks={block: f"blocks.{place}" for place, block in enumerate(model.blocks)},
    )


def fake_run(model: nn.Module, factory: Factory, policy: str = "none", **options: Any) -> Run:
    fake = as_fake(model)
    recompute.apply(fake.blocks, policy)
    with fakes():
        optimizer = factory(fake.parameters())
    return run_of(fake, optimizer, fake_like(torch.empty(ROWS, WIDTH)), **options)


def peak_of(recording: Recording) -> dict[str, int]:
    return causes_at_peak(recording, SECOND_STEP)


def measured_bytes(model: nn.Module, factory: Factory, policy: str, *, accumulated: bool) -> int:
    recompute.apply(model.blocks, policy)
    run = run_of(model, factory(model.parameters()), torch.randn(ROWS, WIDTH), accumulated=accumulated)

    def step() -> None:
        for _ in range(2 if accumulated else 1):
            run.backward(run.forward())
        run.update()

    step()
    states = [value for state in run.optimizer.state.values() for value in state.values()]
    held = [*model.parameters(), *model.buffers(), *(value for value in states if isinstance(value, Tensor))]
    return sum(tensor.nbytes for tensor in held) + measure(step).peak_bytes


@pytest.mark.parametrize("factory", ADAMW)
@pytest.mark.parametrize(("policy", "accumulated"), [("none", False), ("selective", True), ("full", False)])
def test_the_peak_is_that_of_a_real_step(factory: Factory, policy: str, accumulated: bool) -> None:
    model = Net()
    traced = sum(peak_of(trace_step(fake_run(model, factory, policy, accumulated=accumulated))).values())
    assert traced == pytest.approx(measured_bytes(model, factory, policy, accumulated=accumulated), abs=SLACK_BYTES)


def test_causes_are_what_they_are_called() -> None:
    model = Net()
    weights = sum(parameter.nbytes for parameter in model.parameters())
    causes = peak_of(trace_step(fake_run(model, ADAMW[0], accumulated=True)))
    assert causes["weights"] == causes["gradients"] == weights
    assert causes["optimizer_state"] == pytest.approx(2 * weights, abs=SLACK_BYTES)
    kept = BLOCKS * ROWS * (WIDTH + 2 * 4 * WIDTH) * 4
    assert causes["activations"] == pytest.approx(kept, rel=0.05)
    assert causes["communication"] == causes["logits"] == causes["master_weights"] == 0


def test_a_recording_tells_which_block_holds_what_and_when() -> None:
    recording = trace_step(fake_run(Net(), ADAMW[0]))
    places = recording.places_at_peak(SECOND_STEP)
    assert {f"blocks.{place}" for place in range(BLOCKS)} <= places.keys()
    assert places["blocks.0"] == pytest.approx(places["blocks.1"], rel=0.1)
    state = 3 * sum(parameter.nbytes for parameter in Block().parameters())  # weights and two moments
    assert all(places[f"blocks.{place}"] > state for place in range(BLOCKS))
    kept = {place for place, cause in zip(recording.places, recording.causes, strict=True) if cause == "gradients"}
    assert kept == {f"blocks.{place}" for place in range(BLOCKS)}
    assert set(recording.phases) >= {"forward", "backward", "update"}
    assert recording.marks[FIRST_STEP] < recording.marks[SECOND_STEP] < len(recording.events)


def test_what_is_computed_again_belongs_to_its_block() -> None:
    recording = trace_step(fake_run(Net(), ADAMW[0], "full"))
    again = [
        place
        for place, cause, phase in zip(recording.places, recording.causes, recording.phases, strict=True)
        if place and phase == "backward" and cause == "activations"
    ]
    assert again == sorted(again, reverse=True)
    assert set(again) == {f"blocks.{place}" for place in range(BLOCKS)}


def test_parameters_without_a_gradient_have_no_state() -> None:
    model = Net(idle=True)
    assert model.idle is not None
    trained = sum(parameter.nbytes for parameter in model.blocks.parameters())
    causes = peak_of(trace_step(fake_run(model, ADAMW[0])))
    assert causes["optimizer_state"] == pytest.approx(2 * trained, abs=SLACK_BYTES)


def test_an_update_holds_states_gradients_and_its_temporaries() -> None:
    model = Net()
    weights = sum(parameter.nbytes for parameter in model.parameters())
    fused, many = (trace_update(fake_run(model, factory)) for factory in ADAMW[:2])
    for update in (fused, many):
        assert update.weight_bytes == weights and update.seconds == 0
        assert update.held_bytes == pytest.approx(3 * weights, abs=SLACK_BYTES)
    assert fused.peak_bytes == pytest.approx(4 * weights, abs=SLACK_BYTES)
    assert many.peak_bytes == pytest.approx(5 * weights, abs=SLACK_BYTES)


def test_what_is_held_besides_counts_all_along() -> None:
    plain = fake_run(Net(), ADAMW[0])
    more = fake_run(Net(), ADAMW[0])
    held = fake_like(torch.empty(1000))
    more = Run(**{**vars(more), "held": (held,), "held_bytes": 96})
    peaks = [sum(peak_of(trace_step(run)).values()) for run in (plain, more)]
    assert peaks[1] - peaks[0] == held.nbytes + 96
