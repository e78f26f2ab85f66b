"""Low-precision normalizations: results, gradients, statistics, and what is kept."""

from __future__ import annotations

from collections.abc import Callable

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor

from bigtrain.amp.norm import layer_norm, rms_norm

pytestmark = pytest.mark.usefixtures("torch_seed")
LOW = [torch.bfloat16, torch.float16]
WIDTH = 24


def layer(x: Tensor, weight: Tensor, bias: Tensor) -> Tensor:
    return layer_norm(x, weight.shape, weight, bias, 1e-5)


def root(x: Tensor, weight: Tensor, bias: Tensor) -> Tensor:
    return rms_norm(x, weight.shape, weight, 1e-6) + bias


def torchs_layer(x: Tensor, weight: Tensor, bias: Tensor) -> Tensor:
    return F.layer_norm(x, weight.shape, weight, bias, 1e-5)


def torchs_root(x: Tensor, weight: Tensor, bias: Tensor) -> Tensor:
    return F.rms_norm(x, weight.shape, weight, 1e-6) + bias


PAIRS = pytest.mark.parametrize(("mine", "torchs"), [(layer, torchs_layer), (root, torchs_root)], ids=["layer", "rms"])
Norm = Callable[[Tensor, Tensor, Tensor], Tensor]


def inputs(shape: tuple[int, ...], dtype: torch.dtype, kept: torch.dtype, dims: int = 1) -> list[Tensor]:
    x = (3 + 2 * torch.randn(shape)).to(dtype)
    weight, bias = (1 + 0.1 * torch.randn(shape[-dims:]) for _ in range(2))
    return [tensor.requires_grad_() for tensor in (x, weight.to(kept), bias.to(kept))]


def kept_by(mine: Norm, tensors: list[Tensor]) -> list[Tensor]:
    kept: list[Tensor] = []
    with torch.autograd.graph.saved_tensors_hooks(lambda tensor: kept.append(tensor) or tensor, lambda tensor: tensor):
        mine(*tensors)
    return kept


@PAIRS
@pytest.mark.parametrize(("shape", "dims"), [((6,), 1), ((5, 6), 1), ((2, 3, 6), 1), ((2, 3, 4), 2)])
def test_fp64_gradients_are_those_of_the_formula(mine: Norm, torchs: Norm, shape: tuple[int, ...], dims: int) -> None:
    tensors = inputs(shape, torch.float64, torch.float64, dims)
    torch.testing.assert_close(mine(*tensors), torchs(*tensors))
    assert torch.autograd.gradcheck(mine, tensors)


@PAIRS
@pytest.mark.parametrize("kept", ["fp32", "low"])
@pytest.mark.parametrize("dtype", LOW)
def test_results_are_within_rounding_of_fp64(mine: Norm, torchs: Norm, kept: str, dtype: torch.dtype) -> None:
    tensors = inputs((4, 7, WIDTH), dtype, torch.float32 if kept == "fp32" else dtype)
    exact = [tensor.detach().to(dtype).double().requires_grad_() for tensor in tensors]
    grad = torch.randn(4, 7, WIDTH).to(dtype)
    found, expected = mine(*tensors), torchs(*exact)
    grads = torch.autograd.grad(found, tensors, grad.to(found.dtype))
    rounding = torch.finfo(dtype).eps
    torch.testing.assert_close(found.double(), expected, rtol=2 * rounding, atol=2 * rounding)
    assert [g.dtype for g in grads] == [tensor.dtype for tensor in tensors]
    for g, e in zip(grads, torch.autograd.grad(expected, exact, grad.double()), strict=True):
        assert float((g.double() - e).norm() / e.norm()) < 2 * rounding


def test_layer_norm_keeps_the_input_the_parameters_and_two_fp32_numbers_a_row() -> None:
    tensors = inputs((7, WIDTH), torch.bfloat16, torch.float32)
    kept = kept_by(layer, tensors)
    assert [tensor.data_ptr() for tensor in kept[:3]] == [tensor.data_ptr() for tensor in tensors]
    assert [(tensor.dtype, tuple(tensor.shape)) for tensor in kept[3:]] == 2 * [(torch.float32, (7, 1))]


def test_rms_norm_keeps_the_input_the_weight_and_an_fp32_number_a_row() -> None:
    tensors = inputs((7, WIDTH), torch.bfloat16, torch.float32)
    kept = kept_by(root, tensors)
    assert [tensor.data_ptr() for tensor in kept[:2]] == [tensor.data_ptr() for tensor in tensors[:2]]
    assert [(tensor.dtype, tuple(tensor.shape)) for tensor in kept[2:]] == [(torch.float32, (7, 1))]


def test_statistics_are_fp32_where_torchs_own_are_bf16() -> None:
    """With a mean far from zero, bf16 statistics are off by more than the output's rounding."""
    x = (torch.randn(64, WIDTH) + 30).bfloat16().requires_grad_()
    one, zero = torch.ones(WIDTH), torch.zeros(WIDTH)
    exact = x.detach().double().requires_grad_()
    grad = torch.randn(64, WIDTH).bfloat16()
    (expected,) = torch.autograd.grad(torchs_layer(exact, one.double(), zero.double()), exact, grad.double())
    (mine,) = torch.autograd.grad(layer(x, one, zero), x, grad)
    (native,) = torch.autograd.grad(torchs_layer(x, one.bfloat16(), zero.bfloat16()), x, grad)
    error, native_error = ((found.double() - expected).norm() / expected.norm() for found in (mine, native))
    assert error < 2**-8 < native_error


@pytest.mark.parametrize("needed", [(True, False), (False, True)])
@PAIRS
def test_only_the_gradients_that_are_needed(mine: Norm, torchs: Norm, needed: tuple[bool, bool]) -> None:
    x, weight, bias = inputs((5, WIDTH), torch.bfloat16, torch.float32)
    x.requires_grad_(needed[0])
    weight.requires_grad_(needed[1])
    mine(x, weight, bias.requires_grad_(False)).float().square().sum().backward()
    assert (x.grad is not None, weight.grad is not None, bias.grad is not None) == (*needed, False)


def test_layer_norm_without_a_bias() -> None:
    x, weight, _ = inputs((5, WIDTH), torch.float64, torch.float64)
    torch.testing.assert_close(layer_norm(x, [WIDTH], weight, None, 1e-5), F.layer_norm(x, [WIDTH], weight, None, 1e-5))
    assert torch.autograd.gradcheck(lambda x, weight: layer_norm(x, [WIDTH], weight, None, 1e-5), (x, weight))


def test_rms_norm_without_eps_has_that_of_fp32() -> None:
    """bf16's own, 2^-7, would change what small inputs become."""
    x = (1e-3 * torch.randn(5, WIDTH)).bfloat16()
    weight = torch.ones(WIDTH)
    expected = F.rms_norm(x.float(), [WIDTH], weight, None)
    torch.testing.assert_close(rms_norm(x, [WIDTH], weight, None).float(), expected, rtol=2**-7, atol=0)


@PAIRS
def test_a_gradient_that_is_not_contiguous(mine: Norm, torchs: Norm) -> None:
    tensors = inputs((6, WIDTH), torch.float32, torch.float32)
    grad = torch.randn(WIDTH, 6).T
    for found, expected in zip(
        torch.autograd.grad(mine(*tensors), tensors, grad),
        torch.autograd.grad(torchs(*tensors), tensors, grad),
        strict=True,
    ):
        torch.testing.assert_close(found, expected, rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize("device", ["cpu", pytest.param("cuda", marks=pytest.mark.gpu)])
@PAIRS
@pytest.mark.parametrize("dtype", LOW)
def test_a_device_agrees_with_the_cpu(mine: Norm, torchs: Norm, dtype: torch.dtype, device: str) -> None:
    tensors = inputs((9, WIDTH), dtype, torch.float32)
    on_device = [tensor.detach().to(device, copy=True).requires_grad_() for tensor in tensors]
    mine(*tensors).float().square().sum().backward()
    mine(*on_device).float().square().sum().backward()
    for there, here in zip(on_device, tensors, strict=True):
        assert float((there.grad.cpu().float() - here.grad.float()).norm() / here.grad.float().norm()) < 0.02
