"""A low-precision linear layer: what it returns, its gradients, and what it keeps for them."""

from __future__ import annotations

import pytest
import torch
import torch.nn.functional as F
from hypothesis import given
from hypothesis import strategies as st
from torch import Tensor

from bigtrain import products
from bigtrain.amp.linear import gradient_dtype, linear

pytestmark = pytest.mark.usefixtures("torch_seed")
LOW = [torch.bfloat16, torch.float16]


def leaf(*shape: int, dtype: torch.dtype = torch.float32, scale: float = 1.0) -> Tensor:
    return (scale * torch.randn(shape)).to(dtype).requires_grad_()


def relative(found: Tensor, expected: Tensor) -> float:
    found, expected = found.detach().double(), expected.detach().double()
    return float((found - expected).norm() / expected.norm())


@pytest.mark.parametrize("bias", [True, False])
@pytest.mark.parametrize("shape", [(5,), (4, 5), (2, 3, 5)])
def test_fp64_gradients_are_those_of_the_formula(shape: tuple[int, ...], bias: bool) -> None:
    x, weight = leaf(*shape, dtype=torch.float64), leaf(3, 5, dtype=torch.float64)
    inputs = (x, weight, leaf(3, dtype=torch.float64) if bias else None)
    assert torch.autograd.gradcheck(linear, inputs)


@pytest.mark.parametrize("bias", [True, False])
def test_fp32_is_what_torch_computes(bias: bool) -> None:
    x, weight, b = leaf(7, 16), leaf(9, 16), leaf(9) if bias else None
    grad = torch.randn(7, 9)
    found, expected = linear(x, weight, b), F.linear(x, weight, b)
    inputs = [t for t in (x, weight, b) if t is not None]
    assert torch.equal(found, expected)
    for mine, torchs in zip(
        torch.autograd.grad(found, inputs, grad), torch.autograd.grad(expected, inputs, grad), strict=True
    ):
        torch.testing.assert_close(mine, torchs)


@pytest.mark.parametrize("slow", [True, False])
@pytest.mark.parametrize("dtype", LOW)
@pytest.mark.parametrize("weight_dtype", ["fp32", "low"])
def test_results_are_within_rounding_of_fp64(
    slow: bool, dtype: torch.dtype, weight_dtype: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(products, "SLOW_BF16", slow)
    kept = torch.float32 if weight_dtype == "fp32" else dtype
    x, weight, bias = leaf(2, 9, 32, dtype=dtype), leaf(16, 32, dtype=kept), leaf(16, dtype=kept)
    grad = torch.randn(2, 9, 16).to(dtype)
    exact = [t.detach().to(dtype).double().requires_grad_() for t in (x, weight, bias)]
    found, expected = linear(x, weight, bias), F.linear(*exact)
    found_grads = torch.autograd.grad(found, (x, weight, bias), grad)
    expected_grads = torch.autograd.grad(expected, exact, grad.double())
    rounding = torch.finfo(dtype).eps
    assert found.dtype == dtype
    assert relative(found, expected) < rounding
    assert [g.dtype for g in found_grads] == [dtype, kept, kept]
    assert all(relative(g, e) < rounding for g, e in zip(found_grads, expected_grads, strict=True))


@pytest.mark.parametrize("dtype", LOW)
def test_it_is_what_torch_does_natively(dtype: torch.dtype, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(products, "SLOW_BF16", False)
    x, weight, bias = leaf(4, 8, dtype=dtype), leaf(6, 8, dtype=dtype), leaf(6, dtype=dtype)
    grad = torch.randn(4, 6).to(dtype)
    found, expected = linear(x, weight, bias), F.linear(x, weight, bias)
    assert torch.equal(found, expected)
    for mine, torchs in zip(
        torch.autograd.grad(found, (x, weight, bias), grad),
        torch.autograd.grad(expected, (x, weight, bias), grad),
        strict=True,
    ):
        torch.testing.assert_close(mine, torchs, rtol=2 * torch.finfo(dtype).eps, atol=1e-2)


def test_widened_products_give_gradients_of_fp32_weights_unrounded(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(products, "SLOW_BF16", True)
    x, weight, bias = leaf(9, 8, dtype=torch.bfloat16), leaf(6, 8), leaf(6)
    grad = torch.randn(9, 6).bfloat16()
    linear(x, weight, bias).backward(grad)
    assert torch.equal(weight.grad, grad.float().T @ x.detach().float())
    torch.testing.assert_close(bias.grad, grad.float().sum(0))


def test_accumulated_gradients_of_bf16_weights_are_summed_in_fp32() -> None:
    x, weight, bias = leaf(9, 8, dtype=torch.bfloat16), leaf(6, 8, dtype=torch.bfloat16), leaf(6, dtype=torch.bfloat16)
    weight.grad_dtype = bias.grad_dtype = torch.float32
    expected = torch.zeros(6, 8)
    for _ in range(40):
        grad = torch.randn(9, 6).bfloat16()
        linear(x, weight, bias).backward(grad)
        expected += grad.float().T @ x.detach().float()
    assert weight.grad.dtype == bias.grad.dtype == torch.float32
    assert relative(weight.grad, expected) < (1e-6 if products.SLOW_BF16 else 4e-3)


@given(needed=st.lists(st.booleans(), min_size=3, max_size=3).filter(any))
def test_only_the_gradients_that_are_needed(needed: list[bool]) -> None:
    inputs = [leaf(4, 8, dtype=torch.bfloat16), leaf(6, 8), leaf(6)]
    for tensor, need in zip(inputs, needed, strict=True):
        tensor.requires_grad_(need)
    linear(*inputs).float().sum().backward()
    assert [tensor.grad is not None for tensor in inputs] == needed


def test_what_is_kept_is_the_input_and_the_parameter_itself() -> None:
    x, weight, bias = leaf(4, 8, dtype=torch.bfloat16), leaf(6, 8), leaf(6)
    kept: list[Tensor] = []
    with torch.autograd.graph.saved_tensors_hooks(lambda tensor: kept.append(tensor) or tensor, lambda tensor: tensor):
        linear(x, weight, bias)
    assert [tensor.data_ptr() for tensor in kept] == [x.data_ptr(), weight.data_ptr()]


def test_a_weight_changed_between_the_passes_is_noticed() -> None:
    x, weight = leaf(4, 8, dtype=torch.bfloat16), leaf(6, 8)
    out = linear(x, weight, None)
    with torch.no_grad():
        weight.mul_(2)
    with pytest.raises(RuntimeError, match="modified by an inplace operation"):
        out.float().sum().backward()


def test_second_derivatives_are_refused() -> None:
    x, weight = leaf(4, 8), leaf(6, 8)
    (grad,) = torch.autograd.grad(linear(x, weight, None).square().sum(), x, create_graph=True)
    with pytest.raises(RuntimeError, match="once_differentiable"):
        grad.sum().backward()


def test_no_rows_give_zero_gradients() -> None:
    x, weight, bias = leaf(0, 8, dtype=torch.bfloat16), leaf(6, 8), leaf(6)
    out = linear(x, weight, bias)
    out.float().sum().backward()
    assert out.shape == (0, 6)
    assert not weight.grad.any()
    assert not bias.grad.any()


def test_dtype_of_gradients() -> None:
    weight = leaf(3, dtype=torch.bfloat16)
    assert gradient_dtype(weight) == torch.bfloat16
    weight.grad_dtype = torch.float32
    assert gradient_dtype(weight) == torch.float32
    assert gradient_dtype(weight.view(3, 1)) == torch.bfloat16
    weight.grad_dtype = None
    assert gradient_dtype(weight) == torch.bfloat16
