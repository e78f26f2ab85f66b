"""Elementwise work: torch's numbers, with less kept."""

from __future__ import annotations

from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import nn

from bigtrain.models.pointwise import GELU, RMSNorm, SwiGLU


def kept_by(function, *tensors):
    """Return the tensors that a function keeps for its backward pass."""
    kept = []
    with torch.autograd.graph.saved_tensors_hooks(lambda tensor: kept.append(tensor) or tensor, lambda tensor: tensor):
        function(*tensors)
    return kept


def plain_swiglu(x):
    gate, up = x.chunk(2, dim=-1)
    return F.silu(gate) * up


def filled_norm(width, **options):
    """Return a norm and torch's, with the same weights, none of them 1."""
    ours, torchs = RMSNorm(width, eps=1e-5, **options), nn.RMSNorm(width, eps=1e-5, **options)
    with torch.no_grad():
        ours.weight.normal_()
        torchs.weight.copy_(ours.weight)
    return ours, torchs


@pytest.mark.parametrize("dtype", (torch.float32, torch.float64))
def test_swiglu_equals_torchs_operations(torch_seed, dtype):
    x = torch.randn(7, 12, dtype=dtype, requires_grad=True)
    slopes = torch.randn(7, 6, dtype=dtype)
    results = [(out := function(x), *torch.autograd.grad(out, x, slopes)) for function in (SwiGLU(), plain_swiglu)]
    torch.testing.assert_close(*results, rtol=1e-6, atol=1e-6)


def test_swiglu_has_the_right_derivatives(torch_seed):
    assert torch.autograd.gradcheck(SwiGLU(), (torch.randn(5, 8, dtype=torch.float64, requires_grad=True),))


def test_swiglu_keeps_its_input_only(torch_seed):
    x = torch.randn(7, 12, requires_grad=True)
    assert [tensor.data_ptr() for tensor in kept_by(SwiGLU(), x)] == [x.data_ptr()]
    assert sum(tensor.nbytes for tensor in kept_by(plain_swiglu, x)) > x.nbytes


def test_swiglu_changes_nothing_that_came(torch_seed):
    x, slopes = torch.randn(7, 12, requires_grad=True), torch.randn(7, 6)
    before = x.detach().clone(), slopes.clone()
    SwiGLU()(x).backward(slopes)
    assert torch.equal(x, before[0])
    assert torch.equal(slopes, before[1])


@pytest.mark.parametrize("dtype", (torch.float32, torch.float64))
def test_the_norm_equals_torchs(torch_seed, dtype):
    x, slopes = torch.randn(9, 16, dtype=dtype, requires_grad=True), torch.randn(9, 16, dtype=dtype)
    results = []
    for norm in filled_norm(16, dtype=dtype):
        out = norm(x)
        results.append((out, *torch.autograd.grad(out, (x, norm.weight), slopes)))
    torch.testing.assert_close(*results, rtol=1e-5, atol=1e-6)


def test_the_norm_has_the_right_derivatives(torch_seed):
    norm, _ = filled_norm(6, dtype=torch.float64)
    x = torch.randn(5, 6, dtype=torch.float64, requires_grad=True)
    assert torch.autograd.gradcheck(
        lambda x, weight: torch.func.functional_call(norm, {"weight": weight}, (x,)), (x, norm.weight)
    )


def test_the_norm_keeps_its_input_its_weight_and_a_number_for_each_token(torch_seed):
    norm, _ = filled_norm(16)
    x = torch.randn(9, 16, requires_grad=True)
    first, weight, inverse = kept_by(norm, x)
    assert (first.data_ptr(), weight.data_ptr()) == (x.data_ptr(), norm.weight.data_ptr())
    assert (inverse.numel(), inverse.dtype) == (9, torch.float32)


@pytest.mark.parametrize("weights", (torch.float32, torch.bfloat16))
def test_the_norm_of_bf16_is_that_of_fp32_rounded(torch_seed, weights):
    norm, _ = filled_norm(64, dtype=weights)
    x, slopes = torch.randn(9, 64).bfloat16().requires_grad_(), torch.randn(9, 64).bfloat16()
    wide, weight = x.detach().float().requires_grad_(), norm.weight.detach().float().requires_grad_()
    found, right = norm(x), F.rms_norm(wide, (64,), weight, 1e-5)
    found_grads = torch.autograd.grad(found, (x, norm.weight), slopes)
    right_grads = torch.autograd.grad(right, (wide, weight), slopes.float())
    assert [found.dtype, *(grad.dtype for grad in found_grads)] == [torch.bfloat16, torch.bfloat16, weights]
    for one, other in zip((found, *found_grads), (right, *right_grads), strict=True):
        torch.testing.assert_close(one, other.to(one.dtype), rtol=8e-3, atol=4e-3)


def test_a_token_of_zeros_stays_zero_and_has_finite_slopes():
    norm = RMSNorm(4, eps=1e-6)
    x = torch.zeros(3, 4, requires_grad=True)
    out = norm(x)
    out.sum().backward()
    assert not out.any()
    assert x.grad.isfinite().all()


def test_a_row_without_tokens_gives_none():
    norm = RMSNorm(4, eps=1e-6)
    x = torch.zeros(0, 4, requires_grad=True)
    norm(x).sum().backward()
    assert not norm.weight.grad.any()
    assert x.grad.shape == SwiGLU()(torch.zeros(0, 8)).shape == (0, 4)


@pytest.mark.parametrize(("dtype", "bound"), [(torch.float32, 2e-6), (torch.float64, 1e-14)])
@pytest.mark.parametrize("rows", [1, 7, 300])
def test_tanh_gelu_equals_torchs(dtype: torch.dtype, bound: float, rows: int) -> None:
    x = (3 * torch.randn(rows, 1500, dtype=dtype)).requires_grad_()
    slopes = torch.randn(rows, 1500, dtype=dtype)
    ours, theirs = GELU("tanh")(x), F.gelu(x, approximate="tanh")
    assert (ours - theirs).abs().max() < bound
    grads = [torch.autograd.grad(out, x, slopes)[0] for out in (ours, theirs)]
    assert torch.equal(*grads)
    assert torch.equal(GELU("tanh").gradient(slopes.clone(), x.detach()), grads[0])


def test_tanh_gelu_of_large_numbers_and_none() -> None:
    x = torch.tensor([[-1e4, -20.0, -0.0, 0.0, 20.0, 1e4]])
    assert torch.equal(GELU("tanh")(x), F.gelu(x, approximate="tanh"))
    assert GELU("tanh")(torch.zeros(0, 4)).shape == (0, 4)
    assert GELU("tanh")(torch.zeros(3, 0)).shape == (3, 0)


@pytest.mark.parametrize("approximate", ["none", "tanh"])
def test_gelu_of_low_precision_is_torchs(approximate: Any) -> None:
    x = torch.randn(5, 8, dtype=torch.bfloat16)
    assert torch.equal(GELU(approximate)(x), F.gelu(x, approximate=approximate))
