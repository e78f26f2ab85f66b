"""What all optimizers share: skipped steps, saved states, single updates, bounded pieces."""

from __future__ import annotations

import copy
from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import Tensor, nn

from bigtrain.errors import InputError
from bigtrain.optim import Adafactor, AdamW, Lamb, Muon
from bigtrain.optim.cost import MASTER_WEIGHTS, OPTIMIZERS, PIECE_ELEMENTS, STATES, supported_states
from bigtrain.optim.piecewise import Piecewise, bias_corrections, rms_scale

SHAPES = [(70, 64), (5, 3), (9,), (3, 2, 4)]
COMBINATIONS = [(name, state, weights) for name in OPTIMIZERS for state in STATES for weights in MASTER_WEIGHTS]
each = pytest.mark.parametrize(
    ("name", "state", "weights"), [c for c in COMBINATIONS if c[1] in supported_states(c[0])]
)
KINDS: dict[str, Callable[..., Piecewise]] = {"adamw": AdamW, "lamb": Lamb, "muon": Muon}


def parameters_for(weights: str, seed: int = 0) -> list[nn.Parameter]:
    generator = torch.Generator().manual_seed(seed)
    dtype = torch.float32 if weights == "fp32" else torch.bfloat16
    return [nn.Parameter(torch.randn(shape, generator=generator).to(dtype)) for shape in SHAPES]


def optimizer_for(name: str, state: str, weights: str, parameters: list[nn.Parameter]) -> Piecewise:
    if name == "adafactor":
        return Adafactor(parameters, 0.01, 0.1, master_weights=weights)
    groups: Any = parameters
    if name == "muon":
        groups = [
            {"params": [p for p in parameters if p.ndim == 2], "orthogonal": True},
            {"params": [p for p in parameters if p.ndim != 2]},
        ]
    return KINDS[name](groups, 0.01, weight_decay=0.1, state=state, master_weights=weights)


def give_gradients(parameters: list[nn.Parameter], step: int) -> None:
    generator = torch.Generator().manual_seed(1000 + step)
    for parameter in parameters:
        parameter.grad = torch.randn(parameter.shape, generator=generator).to(parameter.dtype)


def everything(optimizer: Piecewise, parameters: list[nn.Parameter]) -> dict[str, Tensor]:
    held = {f"{place}.{key}": value for place, p in enumerate(parameters) for key, value in optimizer.state[p].items()}
    return {**{str(place): p.detach() for place, p in enumerate(parameters)}, **held}


def same(one: dict[str, Tensor], other: dict[str, Tensor]) -> bool:
    """Compare bit by bit, also where numbers are not numbers."""
    return one.keys() == other.keys() and all(
        torch.equal(value.view(-1).view(torch.uint8), other[key].view(-1).view(torch.uint8))
        for key, value in one.items()
    )


@each
@pytest.mark.parametrize("readable", [True, False], ids=["host", "device"])
def test_a_skipped_step_changes_nothing(
    name: str, state: str, weights: str, readable: bool, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(Piecewise, "_is_readable", staticmethod(lambda found_inf: readable))
    parameters = parameters_for(weights)
    optimizer = optimizer_for(name, state, weights, parameters)
    for step in range(2):
        give_gradients(parameters, step)
        optimizer.step()
    before = copy.deepcopy(everything(optimizer, parameters))
    optimizer.found_inf = torch.tensor(1.0)
    for parameter in parameters:
        assert parameter.grad is not None
        parameter.grad.view(-1)[0] = float("inf")
        parameter.grad.view(-1)[1] = float("nan")
    optimizer.step()
    optimizer.update(parameters[0])
    assert same(before, everything(optimizer, parameters))


@each
@pytest.mark.parametrize("readable", [True, False], ids=["host", "device"])
def test_a_step_that_is_not_skipped_is_the_plain_one(
    name: str, state: str, weights: str, readable: bool, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(Piecewise, "_is_readable", staticmethod(lambda found_inf: readable))
    results = []
    for found_inf in (None, torch.tensor(0.0)):
        parameters = parameters_for(weights)
        optimizer = optimizer_for(name, state, weights, parameters)
        optimizer.found_inf = found_inf
        for step in range(3):
            give_gradients(parameters, step)
            optimizer.step()
        results.append(everything(optimizer, parameters))
    assert same(*results)
    assert results[0]["0.step"] == 3


@each
def test_a_first_step_that_is_skipped_makes_no_state(name: str, state: str, weights: str) -> None:
    parameters = parameters_for(weights)
    optimizer = optimizer_for(name, state, weights, parameters)
    give_gradients(parameters, 0)
    optimizer.found_inf = torch.tensor(1.0)
    optimizer.step()
    assert not optimizer.state


@each
@pytest.mark.parametrize("by", ["tensors", "state_dict"])
def test_a_saved_state_goes_on_bitwise(name: str, state: str, weights: str, by: str) -> None:
    parameters = parameters_for(weights)
    optimizer = optimizer_for(name, state, weights, parameters)
    for step in range(3):
        give_gradients(parameters, step)
        optimizer.step()
    others = [nn.Parameter(p.detach().clone()) for p in parameters]
    fresh = optimizer_for(name, state, weights, others)
    if by == "tensors":
        for parameter, other in zip(parameters, others, strict=True):
            for key, value in optimizer.state[parameter].items():
                fresh.state[other][key] = value.clone()
    else:
        fresh.load_state_dict(copy.deepcopy(optimizer.state_dict()))
    for step in range(3, 6):
        for each_of, each_optimizer in ((parameters, optimizer), (others, fresh)):
            give_gradients(each_of, step)
            each_optimizer.step()
    assert same(everything(optimizer, parameters), everything(fresh, others))


@each
def test_single_updates_in_any_order_are_the_step(name: str, state: str, weights: str) -> None:
    together, single = parameters_for(weights), parameters_for(weights)
    one = optimizer_for(name, state, weights, together)
    other = optimizer_for(name, state, weights, single)
    for step in range(3):
        give_gradients(together, step)
        give_gradients(single, step)
        one.step()
        for parameter in reversed(single):
            other.update(parameter)
    assert same(everything(one, together), everything(other, single))


@each
def test_gradients_of_another_dtype(name: str, state: str, weights: str) -> None:
    results = []
    for wide in (False, True):
        parameters = parameters_for(weights)
        optimizer = optimizer_for(name, state, weights, parameters)
        for parameter in parameters:
            gradient = torch.randn(parameter.shape, generator=torch.Generator().manual_seed(1)).bfloat16()
            parameter.grad_dtype = None
            parameter.grad = gradient.float() if wide else gradient
        optimizer.step()
        results.append(everything(optimizer, parameters))
    for key, value in results[0].items():
        torch.testing.assert_close(value, results[1][key], rtol=1e-6, atol=1e-7)


def test_parameters_without_elements_or_gradients() -> None:
    parameters = [nn.Parameter(torch.zeros(0, 4)), nn.Parameter(torch.ones(3))]
    for name in OPTIMIZERS:
        optimizer = optimizer_for(name, "fp32", "fp32", parameters)
        parameters[0].grad, parameters[1].grad = torch.zeros(0, 4), None
        optimizer.step()
        assert parameters[1] not in optimizer.state
        assert torch.equal(parameters[1], torch.ones(3))


@pytest.mark.parametrize("kind", [AdamW, Lamb])
def test_pieces_change_no_more_than_rounding(kind: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    results = []
    for elements in (256, 2**20):
        monkeypatch.setitem(PIECE_ELEMENTS, "cpu", elements)
        parameters = parameters_for("split24")
        optimizer = kind(parameters, 0.01, weight_decay=0.1, state="fp32", master_weights="split24")
        for step in range(3):
            give_gradients(parameters, step)
            optimizer.step()
        results.append(optimizer.state[parameters[0]]["exp_avg_sq"])
    torch.testing.assert_close(*results, rtol=1e-5, atol=0)


def test_the_closure_is_evaluated_with_gradients() -> None:
    parameter = nn.Parameter(torch.ones(2))
    optimizer = AdamW([parameter], 0.1)

    def closure() -> float:
        loss = (parameter**2).sum()
        loss.backward()
        return loss.item()

    assert optimizer.step(closure) == 2.0
    assert bool((parameter < 1).all())


def test_parameters_of_another_dtype_are_refused() -> None:
    with pytest.raises(InputError, match="is bfloat16; master weights fp32 keep float32"):
        AdamW([nn.Parameter(torch.zeros(2, dtype=torch.bfloat16))])


def test_bias_corrections_are_exact() -> None:
    first, second = bias_corrections(torch.tensor(7.0), (0.9, 0.999))
    assert float(first) == pytest.approx(1 - 0.9**7, rel=1e-14)
    assert float(second) == pytest.approx(1 - 0.999**7, rel=1e-12)


def test_rms_scale() -> None:
    assert rms_scale(100, 25) == pytest.approx(2.0)
