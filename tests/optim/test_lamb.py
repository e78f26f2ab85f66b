"""LAMB against its algorithm written out for one tensor at a time."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor

from bigtrain.optim import lamb
from bigtrain.optim.lamb import Lamb

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


def test_bunches_change_nothing_and_stay_small(monkeypatch: pytest.MonkeyPatch) -> None:
    results = []
    for elements in (1, 40, 10**9):
        monkeypatch.setattr(lamb, "BUNCH_ELEMENTS", elements)
        torch.manual_seed(3)
        parameters = [torch.nn.Parameter(torch.randn(shape)) for shape in SHAPES]
        bunches = list(lamb._bunches(parameters))
        assert [id(p) for bunch in bunches for p in bunch] == [id(p) for p in parameters]
        assert all(len(bunch) == 1 or sum(p.numel() for p in bunch) <= elements for bunch in bunches)
        for parameter in parameters:
            parameter.grad = torch.randn_like(parameter)
        Lamb(parameters, lr=0.1).step()
        results.append(torch.cat([p.detach().flatten() for p in parameters]))
    assert all(torch.equal(result, results[0]) for result in results)


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
def test_equals_apex_where_apex_is() -> None:
    optimizers = pytest.importorskip("apex.optimizers")
    torch.manual_seed(2)
    start = torch.randn(64, 32, device="cuda")
    ours, theirs = torch.nn.Parameter(start.clone()), torch.nn.Parameter(start.clone())
    pair = Lamb([ours], lr=0.01), optimizers.FusedLAMB([theirs], lr=0.01, max_grad_norm=1e9)
    for _ in range(10):
        gradient = torch.randn_like(start)
        for parameter, optimizer in zip((ours, theirs), pair, strict=True):
            parameter.grad = gradient.clone()
            optimizer.step()
    torch.testing.assert_close(ours, theirs, rtol=1e-5, atol=1e-6)
