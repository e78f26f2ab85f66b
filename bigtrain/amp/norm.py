"""Normalizations whose input and output are in low precision and whose statistics are in fp32.

Of a bf16 input on the CPU, torch's own LayerNorm keeps bf16 statistics for the backward pass, and its RMSNorm three
fp32 tensors of the input's size. These keep the input, the parameters and an fp32 number a row, LayerNorm two.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor
from torch.autograd.function import once_differentiable


def layer_norm(x: Tensor, shape: Sequence[int], weight: Tensor | None, bias: Tensor | None, eps: float) -> Tensor:
    """Normalize over the last dims, of this shape; the result is in the dtype of `x`, to which parameters are rounded.

    Ba et al. 2016, arXiv 1607.06450.
    """
    out: Tensor = _LayerNorm.apply(x, weight, bias, list(shape), eps)  # type: ignore[no-untyped-call]
    return out


def rms_norm(x: Tensor, shape: Sequence[int], weight: Tensor, eps: float | None) -> Tensor:
    """Divide by the root mean square over the last dims, of this shape, and multiply by the weight; as `layer_norm`.

    Without `eps`, fp32's. Zhang and Sennrich 2019, arXiv 1910.07467. On CUDA torch has one kernel for it, which keeps
    the rounded weight as well.
    """
    eps = torch.finfo(torch.float32).eps if eps is None else eps
    if x.is_cuda:
        return F.rms_norm(x, list(shape), weight.to(x.dtype), eps)
    out: Tensor = _RMSNorm.apply(x, weight, list(shape), eps)  # type: ignore[no-untyped-call]
    return out


class _LayerNorm(torch.autograd.Function):
    @staticmethod
    def forward(
        ctx: Any, x: Tensor, weight: Tensor | None, bias: Tensor | None, shape: list[int], eps: float
    ) -> Tensor:
        out, mean, deviation = torch.native_layer_norm(x, shape, _read(weight, x), _read(bias, x), eps)
        ctx.save_for_backward(x, weight, bias, mean, deviation)
        ctx.shape = shape
        return out

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor | None, ...]:
        x, weight, bias, mean, deviation = ctx.saved_tensors
        read = _read(weight, x), _read(bias, x)
        grads = torch.ops.aten.native_layer_norm_backward(
            grad.contiguous(), x, ctx.shape, mean, deviation, *read, list(ctx.needs_input_grad[:3])
        )
        return (*grads, None, None)


class _RMSNorm(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, x: Tensor, weight: Tensor, shape: list[int], eps: float) -> Tensor:
        dims, wide = list(range(-len(shape), 0)), torch.promote_types(x.dtype, torch.float32)
        inverse = x.to(wide).square().mean(dims, keepdim=True).add_(eps).rsqrt_()
        ctx.save_for_backward(x, weight, inverse)
        ctx.dims = dims
        return (x * inverse).mul_(weight.to(x.dtype)).to(x.dtype)

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor | None, ...]:
        x, weight, inverse = ctx.saved_tensors
        rounded = weight.to(x.dtype).to(inverse.dtype)
        normal = x * inverse
        slope = grad * normal
        grad_weight = slope.reshape(-1, *weight.shape).sum(0)
        mean = slope.mul_(rounded).mean(ctx.dims, keepdim=True)
        grad_x = normal.mul_(mean).sub_(grad * rounded).mul_(-inverse)
        return grad_x.to(x.dtype), grad_weight, None, None


def _read(parameter: Tensor | None, x: Tensor) -> Tensor | None:
    """Return a parameter rounded to the dtype of `x`; on the CPU widened again, for the kernel to keep fp32 statistics.

    On CUDA the statistics are fp32 anyway, and the kernel wants parameters in the dtype of the input.
    """
    if parameter is None:
        return None
    rounded = parameter.to(x.dtype)
    low = rounded.dtype in (torch.float16, torch.bfloat16)
    return rounded.float() if low and x.device.type == "cpu" else rounded
