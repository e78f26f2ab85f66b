"""The state of a run: saved, restored bitwise, refused for another model."""

from __future__ import annotations

import json
from collections.abc import Iterable
from functools import partial
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor, nn

from bigtrain.amp.loss_scale import LossScale
from bigtrain.amp.precision import apply
from bigtrain.checkpoint import tensors
from bigtrain.checkpoint.state import OPTIMIZER, STATE, WEIGHTS, TrainState, load_weights, optimizer_state, weights
from bigtrain.checkpoint.store import CheckpointStore
from bigtrain.engine import Engine
from bigtrain.errors import CheckpointError
from bigtrain.optim import AdamW, Lamb
from bigtrain.optim.release import release


class Tied(nn.Module):
    def __init__(self, width: int = 6) -> None:
        super().__init__()
        self.embedding = nn.Embedding(10, width)
        self.head = nn.Linear(width, 10)
        self.head.weight = self.embedding.weight
        self.register_buffer("scale", torch.ones(3))
        self.register_buffer("derived", torch.ones(3), persistent=False)

    def forward(self, ids: Tensor) -> Tensor:
        return self.head(self.embedding(ids)).square().mean()


class Position:
    """A loader that only counts."""

    def __init__(self) -> None:
        self.position = 0

    def state_dict(self) -> dict[str, Any]:
        return {"position": self.position}

    def load_state_dict(self, state: dict[str, Any], *, other_data: bool = False) -> None:
        self.position = state["position"]


OPTIMIZERS = {
    "adamw": partial(torch.optim.AdamW, lr=0.1),
    "fused": partial(torch.optim.AdamW, lr=0.1, fused=True),
    "lamb": partial(Lamb, lr=0.1),
    "sgd": partial(torch.optim.SGD, lr=0.1, momentum=0.9),
    "own": partial(AdamW, lr=0.1, state="8bit"),
}


def state_of(
    optimizer: str = "adamw", *, width: int = 6, seed: int = 0, precision: str = "fp32", released: bool = False
) -> TrainState:
    torch.manual_seed(seed)
    model = Tied(width)
    if optimizer == "lean":
        apply(model, "bf16", master_weights="split24")
        built: Any = AdamW(model.parameters(), lr=1e-3, state="8bit", master_weights="split24")
    else:
        built = OPTIMIZERS[optimizer](model.parameters())
    for group in built.param_groups:
        group["initial_lr"] = group["lr"]
    engine = Engine(
        model,
        built,
        micro_batch_size=4,
        shifted_labels=False,
        schedule=lambda _: 1.0,
        loss_scale=LossScale("cpu", precision=precision),
        release=release(model.parameters(), built) if released else None,
    )
    return TrainState(engine, Position())  # type: ignore[arg-type]


def take(state: TrainState, steps: Iterable[int], max_norm: float | None = 1.0) -> None:
    for step in steps:
        ids = torch.arange(4) + step % 5
        for micro in state.engine.micro_batches({"ids": ids}):
            state.engine.backward(state.engine.model(**micro))
        state.engine.step(max_norm)
        state.loader.position += 1
        state.tokens += 4


def save(state: TrainState, folder: Path) -> Path:
    return state.save(CheckpointStore(folder), {"plan.yaml": "a plan"})


def bits(state: TrainState) -> list[Tensor]:
    moments, _ = optimizer_state(state.engine)
    return [*dict(weights(state.engine.model)).values(), *moments.values()]


@pytest.mark.parametrize("optimizer", OPTIMIZERS)
def test_restored_and_gone_on_is_bitwise_the_run_left_alone(tmp_path: Path, optimizer: str) -> None:
    whole, cut = state_of(optimizer), state_of(optimizer)
    take(whole, range(7))
    take(cut, range(3))
    folder = save(cut, tmp_path)
    resumed = state_of(optimizer, seed=99)
    resumed.restore(folder)
    assert (resumed.step, resumed.tokens, resumed.loader.position) == (3, 12, 3)
    assert all(torch.equal(one, other) for one, other in zip(bits(resumed), bits(cut), strict=True))
    take(resumed, range(3, 7))
    assert all(torch.equal(one, other) for one, other in zip(bits(resumed), bits(whole), strict=True))


def test_tied_weights_are_stored_once_and_buffers_that_are_derived_not_at_all(tmp_path: Path) -> None:
    folder = save(state_of(), tmp_path)
    assert set(tensors.read_header(folder / WEIGHTS)) == {"embedding.weight", "head.bias", "scale"}
    assert (folder / "plan.yaml").read_text() == "a plan"
    assert (folder / STATE).is_file()


def test_before_the_first_step_there_are_no_states(tmp_path: Path) -> None:
    folder = save(state_of(), tmp_path)
    assert tensors.read_header(folder / OPTIMIZER) == {}
    state = state_of()
    state.restore(folder)
    assert state.step == 0


def test_loading_keeps_tied_weights_tied(tmp_path: Path) -> None:
    folder = save(state_of(seed=1), tmp_path)
    model = Tied()
    load_weights(model, folder)
    assert model.head.weight is model.embedding.weight
    assert torch.equal(model.head.weight, state_of(seed=1).engine.model.get_parameter("embedding.weight"))


def test_another_shape_is_refused_and_nothing_is_changed(tmp_path: Path) -> None:
    folder = save(state_of(), tmp_path)
    other = state_of(width=8)
    before = [tensor.clone() for tensor in bits(other)]
    with pytest.raises(CheckpointError, match=r"embedding.weight is \(10, 6\), in the model \(10, 8\)"):
        other.restore(folder)
    assert all(torch.equal(one, old) for one, old in zip(bits(other), before, strict=True))


def test_another_model_is_refused_with_the_first_three_differences(tmp_path: Path) -> None:
    folder = save(state_of(), tmp_path)
    with pytest.raises(CheckpointError) as caught:
        load_weights(nn.Sequential(nn.Linear(2, 2), nn.Linear(2, 2)), folder)
    assert str(caught.value).endswith("0.weight is absent; 0.bias is absent; 1.weight is absent")


def test_a_state_of_an_unknown_parameter_is_refused(tmp_path: Path) -> None:
    state = state_of()
    take(state, range(1))
    moments, counters = optimizer_state(state.engine)
    moments["elsewhere.exp_avg"] = torch.zeros(1)
    folder = CheckpointStore(tmp_path).save(
        1,
        {WEIGHTS: dict(weights(state.engine.model)), OPTIMIZER: moments},
        {STATE: json.dumps({"optimizer_class": "AdamW", "optimizer": counters})},
    )
    assert counters == {}
    with pytest.raises(CheckpointError, match="a state of 'elsewhere', which is not in the model"):
        state_of().restore(folder)


def test_states_of_another_optimizer_are_refused(tmp_path: Path) -> None:
    state = state_of("adamw")
    take(state, range(1))
    folder = save(state, tmp_path)
    with pytest.raises(CheckpointError, match="its optimizer states are of AdamW, not of Lamb; start a new run with"):
        state_of("lamb").restore(folder)


def test_the_loss_scale_is_restored_to_the_bit(tmp_path: Path) -> None:
    state = state_of(precision="fp16")
    take(state, range(2))
    for micro in state.engine.micro_batches({"ids": torch.arange(4)}):
        state.engine.backward(state.engine.model(**micro) * 1e36)
    assert state.engine.step().skipped
    take(state, range(3, 6))
    folder = save(state, tmp_path)
    before = state.engine.loss_scale.state_dict()
    assert before == {"scale": 2.0**15, "good_steps": 3}
    other = state_of(precision="fp16", seed=99)
    other.restore(folder)
    assert other.engine.loss_scale.state_dict() == before
    assert other.step == 6
    take(state, range(6, 9))
    take(other, range(6, 9))
    assert other.engine.loss_scale.state_dict() == state.engine.loss_scale.state_dict() != before
    assert all(torch.equal(one, mine) for one, mine in zip(bits(other), bits(state), strict=True))


@pytest.mark.parametrize("released", [False, True])
def test_weights_in_24_bits_and_moments_in_8_are_restored_to_the_bit(tmp_path: Path, released: bool) -> None:
    whole, cut = state_of("lean", width=512, released=released), state_of("lean", width=512, released=released)
    max_norm = None if released else 1.0
    take(whole, range(7), max_norm)
    take(cut, range(3), max_norm)
    folder = save(cut, tmp_path)
    assert tensors.read_header(folder / WEIGHTS)["embedding.weight"].dtype == torch.bfloat16
    assert "embedding.weight.remainder" in tensors.read_header(folder / OPTIMIZER)
    resumed = state_of("lean", width=512, seed=99, released=released)
    resumed.restore(folder)
    assert all(torch.equal(one, other) for one, other in zip(bits(resumed), bits(cut), strict=True))
    take(resumed, range(3, 7), max_norm)
    assert all(torch.equal(one, other) for one, other in zip(bits(resumed), bits(whole), strict=True))
