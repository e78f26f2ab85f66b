"""Adafactor against its algorithm written out."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor, nn

from bigtrain.optim import Adafactor
from bigtrain.optim.cost import PIECE_ELEMENTS

SHAPES = [(5, 7), (9,), (4, 3, 2), (1, 6), (6, 1), ()]


def by_the_paper(start: Tensor, gradients: list[Tensor], lr: float, decay: float) -> Tensor:
    """Algorithms 4 and 5 of arXiv 1804.04235 in double precision, with a given rate and decoupled decay."""
    weight = start.double()
    rows = columns = variance = torch.zeros(())
    for step, given in enumerate(gradients, 1):
        gradient, keep = given.double(), 1 - step**-0.8
        squares = gradient**2 + 1e-30
        if start.ndim >= 2:
            matrix = squares.reshape(start.shape[0], -1)
            rows = keep * rows + (1 - keep) * matrix.sum(1)
            columns = keep * columns + (1 - keep) * matrix.sum(0)
            variance = (torch.outer(rows, columns) / rows.sum()).view(start.shape)
        else:
            variance = keep * variance + (1 - keep) * squares
        update = gradient / variance.sqrt()
        update = update / max(1.0, update.square().mean().sqrt().item())
        weight = weight * (1 - lr * decay) - lr * update
    return weight


@pytest.mark.parametrize("shape", SHAPES)
@pytest.mark.parametrize("decay", [0.0, 0.1])
@pytest.mark.parametrize("piece", [4, 2**16])
def test_ten_steps_are_those_of_the_paper(
    shape: tuple[int, ...], decay: float, piece: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setitem(PIECE_ELEMENTS, "cpu", piece)
    torch.manual_seed(0)
    start = torch.randn(shape)
    gradients = [torch.randn(shape) * (1 + step) for step in range(10)]
    parameter = nn.Parameter(start.clone())
    optimizer = Adafactor([parameter], 0.01, decay)
    for gradient in gradients:
        parameter.grad = gradient.clone()
        optimizer.step()
    torch.testing.assert_close(
        parameter.detach().double(), by_the_paper(start, gradients, 0.01, decay), rtol=1e-5, atol=1e-6
    )


def test_rows_and_columns_are_all_that_is_kept() -> None:
    parameter = nn.Parameter(torch.randn(4, 3, 2))
    optimizer = Adafactor([parameter], 0.01)
    parameter.grad = torch.randn(4, 3, 2)
    optimizer.step()
    shapes = {key: tuple(value.shape) for key, value in optimizer.state[parameter].items()}
    assert shapes == {"step": (), "row": (4,), "column": (6,)}


def test_a_zero_gradient_moves_nothing() -> None:
    parameter = nn.Parameter(torch.ones(4, 4))
    optimizer = Adafactor([parameter], 0.1)
    parameter.grad = torch.zeros(4, 4)
    optimizer.step()
    assert torch.equal(parameter, torch.ones(4, 4))


def test_updates_are_clipped() -> None:
    parameter = nn.Parameter(torch.zeros(8))
    optimizer = Adafactor([parameter], 1.0)
    for size in (1e-3, 1e-3, 1e3):
        before = parameter.detach().clone()
        parameter.grad = torch.full((8,), size)
        optimizer.step()
    assert float((parameter.detach() - before).square().mean().sqrt()) <= 1 + 1e-5


@pytest.mark.parametrize("weights", ["split24", "none"])
def test_weights_in_fewer_bits_stay_close(weights: str) -> None:
    results = []
    start = torch.randn(40, 30, generator=torch.Generator().manual_seed(0)).bfloat16()
    for w in ("fp32", weights):
        parameter = nn.Parameter(start.to(torch.float32 if w == "fp32" else torch.bfloat16, copy=True))
        optimizer = Adafactor([parameter], 0.01, master_weights=w)
        for step in range(30):
            gradient = torch.randn(40, 30, generator=torch.Generator().manual_seed(step)) + start.float()
            parameter.grad = gradient.to(parameter.dtype)
            optimizer.step()
        results.append(parameter.detach().float() - start.float())
    far = torch.linalg.vector_norm(results[1] - results[0]) / torch.linalg.vector_norm(results[0])
    assert float(far) < {"split24": 0.03, "none": 0.12}[weights]
