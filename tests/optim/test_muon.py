"""Muon: singular values near 1, AdamW elsewhere, AdamW's step size."""

from __future__ import annotations

import math

import pytest
import torch
from torch import Tensor, nn

from bigtrain.optim import AdamW, Muon
from bigtrain.optim.cost import MASTER_WEIGHTS, STATES
from bigtrain.optim.muon import orthogonalised

SHAPES = [(16, 48), (48, 16), (32, 32)]


def matrix(shape: tuple[int, int], seed: int = 0) -> Tensor:
    return torch.randn(shape, generator=torch.Generator().manual_seed(seed))


@pytest.mark.parametrize("shape", SHAPES)
def test_singular_values_come_near_1(shape: tuple[int, int]) -> None:
    start = matrix(shape)
    left, values, right = torch.linalg.svd(start, full_matrices=False)
    result = orthogonalised(start.clone())
    kept = (left.T @ result @ right.T).diagonal()[values > 0.05 * values.max()]
    assert bool(((kept > 0.6) & (kept < 1.3)).all())


@pytest.mark.parametrize("shape", SHAPES)
def test_it_is_torchs_iteration(shape: tuple[int, int]) -> None:
    from torch.optim._muon import _zeropower_via_newtonschulz

    start = matrix(shape)
    theirs = _zeropower_via_newtonschulz(start, (3.4445, -4.7750, 2.0315), 5, 1e-7).float()
    torch.testing.assert_close(orthogonalised(start.clone()), theirs, rtol=0.1, atol=0.05)


def test_zero_stays_zero() -> None:
    assert torch.equal(orthogonalised(torch.zeros(4, 6)), torch.zeros(4, 6))


@pytest.mark.parametrize("shape", SHAPES)
def test_the_step_is_the_published_one(shape: tuple[int, int]) -> None:
    parameter = nn.Parameter(matrix(shape))
    expected, momentum = parameter.detach().clone(), torch.zeros(shape)
    optimizer = Muon([{"params": [parameter], "orthogonal": True}], lr=0.01, weight_decay=0.1)
    for step in range(5):
        parameter.grad = matrix(shape, 10 + step)
        momentum = 0.95 * momentum + 0.05 * parameter.grad
        direction = orthogonalised(0.05 * parameter.grad + 0.95 * momentum)
        expected = expected * (1 - 0.01 * 0.1) - 0.01 * 0.2 * max(shape) ** 0.5 * direction
        optimizer.step()
    torch.testing.assert_close(parameter.detach(), expected, rtol=1e-4, atol=1e-5)


def test_the_update_has_adamws_usual_size() -> None:
    parameter = nn.Parameter(torch.zeros(64, 192))
    optimizer = Muon([{"params": [parameter], "orthogonal": True}], lr=1.0, weight_decay=0.0)
    parameter.grad = matrix((64, 192))
    optimizer.step()
    assert 0.15 < float(parameter.detach().square().mean().sqrt()) < 0.25


def test_other_groups_are_adamws() -> None:
    shapes = [(7, 9), (5,)]
    ours = [nn.Parameter(torch.ones(shape)) for shape in shapes]
    theirs = [nn.Parameter(torch.ones(shape)) for shape in shapes]
    pair = Muon(ours, 0.01), AdamW(theirs, 0.01)
    for _ in range(3):
        for parameters, optimizer in zip((ours, theirs), pair, strict=True):
            for place, parameter in enumerate(parameters):
                parameter.grad = torch.randn(parameter.shape, generator=torch.Generator().manual_seed(place))
            optimizer.step()
    assert all(torch.equal(one, other) for one, other in zip(ours, theirs, strict=True))


@pytest.mark.parametrize("state", STATES)
@pytest.mark.parametrize("weights", MASTER_WEIGHTS)
def test_few_bits_stay_close(state: str, weights: str) -> None:
    shape, results = (64, 80), []
    start = matrix(shape).bfloat16()
    for s, w in (("fp32", "fp32"), (state, weights)):
        parameter = nn.Parameter(start.to(torch.float32 if w == "fp32" else torch.bfloat16, copy=True))
        groups = [{"params": [parameter], "orthogonal": True}]
        optimizer = Muon(groups, lr=0.01, weight_decay=0.0, state=s, master_weights=w)
        for step in range(20):
            parameter.grad = (matrix(shape, 99) + matrix(shape, step)).to(parameter.dtype)
            optimizer.step()
        results.append(parameter.detach().float() - start.float())
    far = torch.linalg.vector_norm(results[1] - results[0]) / torch.linalg.vector_norm(results[0])
    moved = {"fp32": 0.06, "bf16": 0.06, "8bit": 0.15, "4bit": 0.5}[state]
    assert float(far) < math.hypot(moved, 0.25 if weights == "none" else 0.0)
    kept = set(optimizer.state[parameter])
    assert kept == {"step", "momentum"} | ({"momentum_scale"} if "bit" in state else set()) | (
        {"remainder"} if weights == "split24" else set()
    )
