"""A linear layer in low precision that keeps its input and its parameters for the backward pass, and no copy of them.

N rows, I features in, O features out, D the low precision.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor
from torch.autograd.function import once_differentiable

from bigtrain import products


def linear(x: Tensor, weight_OI: Tensor, bias_O: Tensor | None) -> Tensor:
    """Return x @ weight.T + bias, (..., I) to (..., O), in the dtype D of `x`, to which the parameters are rounded.

    What is kept for the backward pass is `x` and the weight itself, which is rounded there again. Gradients of
    parameters have their `grad_dtype`: fp32 sums of products stay fp32 where that is wider than D.
    """
    out: Tensor = _Linear.apply(  # type: ignore[no-untyped-call]
        x, weight_OI, bias_O, gradient_dtype(weight_OI), None if bias_O is None else gradient_dtype(bias_O)
    )
    return out


def gradient_dtype(parameter: Tensor) -> torch.dtype:
    """Return the dtype in which autograd keeps a parameter's gradient: its own, unless `grad_dtype` says otherwise."""
    # Only a leaf has the attribute, and compiled code returns gradients in the parameter's dtype in any case.
    if torch.compiler.is_compiling() or not parameter.is_leaf:
        return parameter.dtype
    dtype: torch.dtype | None = parameter.grad_dtype
    return dtype or parameter.dtype


class _Linear(torch.autograd.Function):
    @staticmethod
    def forward(
        ctx: Any,
        x: Tensor,
        weight_OI: Tensor,
        bias_O: Tensor | None,
        weight_dtype: torch.dtype,
        bias_dtype: torch.dtype | None,
    ) -> Tensor:
        ctx.save_for_backward(x, weight_OI)
        ctx.weight_dtype, ctx.bias_dtype = weight_dtype, bias_dtype
        return products.linear(x, weight_OI, bias_O)

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor | None, ...]:
        x, weight_OI = ctx.saved_tensors
        grad_NO = grad.reshape(-1, grad.shape[-1])
        grad_x = grad_weight = grad_bias = None
        if ctx.needs_input_grad[0]:
            grad_x = products.mm(grad_NO, weight_OI).view(x.shape)
        if ctx.needs_input_grad[1]:
            grad_weight = products.mm(grad_NO.T, x.reshape(-1, x.shape[-1]), ctx.weight_dtype)
        if ctx.needs_input_grad[2]:
            grad_bias = grad_NO.sum(0, dtype=ctx.bias_dtype)
        return grad_x, grad_weight, grad_bias, None, None
