"""LAMB against its algorithm written out for one tensor at a time."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor

from bigtrain.optim.cost import MASTER_WEIGHTS, PIECE_ELEMENTS, STATES
from bigtrain.optim.kernels import nvidia_apex_present
from bigtrain.optim.lamb import Lamb, fused_lamb

SHAPES = [(5, 7), (3,), (4, 4, 2)]


def by_the_paper(start: Tensor, gradients: list[Tensor], lr: float, decay: float, eps: float = 1e-6) -> Tensor:
    """Algorithm 2 of arXiv 1904.00962 in double precision."""
    weight, first, second = start.double(), torch.zeros_like(start).double(), torch.zeros_like(start).double()
    for step, gradient in enumerate(gradients, 1):
        first = 0.9 * first + 0.1 * gradient.double()
        second = 0.999 * second + 0.001 * gradient.double() ** 2
        update = (first / (1 - 0.9**step)) / ((second / (1 - 0.999**step)).sqrt() + eps)
        ratio = 1.0
        if decay:
            update = update + decay * weight
            if weight.norm() > 0 and update.norm() > 0:
                ratio = (weight.norm() / update.norm()).item()
        weight = weight - lr * ratio * update
    return weight


@pytest.mark.parametrize("shape", SHAPES)
@pytest.mark.parametrize("decay", [0.0, 0.01])
def test_ten_steps_are_those_of_the_paper(shape: tuple[int, ...], decay: float) -> None:
    torch.manual_seed(0)
    start = torch.randn(shape)
    gradients = [torch.randn(shape) for _ in range(10)]
    parameter = torch.nn.Parameter(start.clone())
    optimizer = Lamb([parameter], lr=0.01, weight_decay=decay)
    for gradient in gradients:
        parameter.grad = gradient.clone()
        optimizer.step()
    torch.testing.assert_close(
        parameter.detach().double(), by_the_paper(start, gradients, 0.01, decay), rtol=1e-5, atol=1e-7
    )


def test_tensors_in_one_call_do_not_touch_each_other() -> None:
    torch.manual_seed(1)
    starts = [torch.randn(shape) for shape in SHAPES]
    gradients = [torch.randn(shape) for shape in SHAPES]
    together = [torch.nn.Parameter(start.clone()) for start in starts]
    alone = [torch.nn.Parameter(start.clone()) for start in starts]
    for parameters in (together, *[[p] for p in alone]):
        optimizer = Lamb(parameters, lr=0.1)
        for parameter in parameters:
            parameter.grad = next(g for g in gradients if g.shape == parameter.shape).clone()
        optimizer.step()
    for one, other in zip(together, alone, strict=True):
        assert torch.equal(one, other)


@pytest.mark.parametrize("elements", [256, 2**20])
def test_pieces_are_one_tensor_to_the_norms(elements: int, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(PIECE_ELEMENTS, "cpu", elements)
    torch.manual_seed(3)
    start, gradients = torch.randn(30, 40), [torch.randn(30, 40) for _ in range(4)]
    parameter = torch.nn.Parameter(start.clone())
    optimizer = Lamb([parameter], lr=0.01, weight_decay=0.01)
    for gradient in gradients:
        parameter.grad = gradient.clone()
        optimizer.step()
    expected = by_the_paper(start, gradients, 0.01, 0.01)
    torch.testing.assert_close(parameter.detach().double(), expected, rtol=1e-5, atol=1e-7)


@pytest.mark.parametrize("state", STATES)
@pytest.mark.parametrize("weights", MASTER_WEIGHTS)
def test_few_bits_stay_close(state: str, weights: str) -> None:
    torch.manual_seed(4)
    start = torch.randn(64, 80).bfloat16()
    mean = torch.randn(64, 80)
    gradients = [(mean + torch.randn(64, 80)).bfloat16() for _ in range(30)]
    parameter = torch.nn.Parameter(start.to(torch.float32 if weights == "fp32" else torch.bfloat16, copy=True))
    optimizer = Lamb([parameter], lr=0.005, weight_decay=0.01, state=state, master_weights=weights)
    for gradient in gradients:
        parameter.grad = gradient.to(parameter.dtype)
        optimizer.step()
    expected = by_the_paper(start, gradients, 0.005, 0.01) - start.double()
    far = (parameter.detach().double() - start.double() - expected).norm() / expected.norm()
    assert float(far) < {"fp32": 0.06, "bf16": 0.06, "8bit": 0.08, "4bit": 0.35}[state]


def test_a_zero_tensor_still_moves() -> None:
    parameter = torch.nn.Parameter(torch.zeros(4))
    optimizer = Lamb([parameter], lr=0.1, weight_decay=0.01)
    parameter.grad = torch.ones(4)
    optimizer.step()
    torch.testing.assert_close(parameter.detach(), torch.full((4,), -0.1), rtol=1e-4, atol=0)


def test_without_a_gradient_nothing_happens() -> None:
    parameter = torch.nn.Parameter(torch.ones(4))
    optimizer = Lamb([parameter], lr=0.1)
    optimizer.step()
    assert torch.equal(parameter, torch.ones(4))
    assert not optimizer.state


def test_the_closure_is_evaluated_with_gradients() -> None:
    parameter = torch.nn.Parameter(torch.ones(2))
    optimizer = Lamb([parameter], lr=0.1)

    def closure() -> float:
        loss = (parameter**2).sum()
        loss.backward()
        return loss.item()

    assert optimizer.step(closure) == 2.0
    assert bool((parameter < 1).all())


@pytest.mark.gpu
@pytest.mark.parametrize("decay", [0.0, 0.01])
def test_equals_apex_where_apex_is(decay: float) -> None:
    if not nvidia_apex_present():
        pytest.skip("NVIDIA's apex is not installed")
    torch.manual_seed(2)
    start = torch.randn(64, 32, device="cuda")
    ours, theirs = torch.nn.Parameter(start.clone()), torch.nn.Parameter(start.clone())
    groups = [{"params": [theirs], "weight_decay": decay}]
    pair = Lamb([ours], lr=0.01, weight_decay=decay), fused_lamb(groups, lr=0.01, betas=(0.9, 0.999), eps=1e-6)
    for _ in range(10):
        gradient = 10 * torch.randn_like(start)
        for parameter, optimizer in zip((ours, theirs), pair, strict=True):
            parameter.grad = gradient.clone()
            optimizer.step()
    torch.testing.assert_close(ours, theirs, rtol=1e-5, atol=1e-6)
    assert pair[1].state[theirs]["step"] == 10
