"""Matrix products of low-precision operands, on processors that have instructions for them and on those that have not.

A bf16 product has bf16 operands, sums in fp32 and rounds the result to bf16. Where the processor cannot do that, torch
emulates it slowly (24 GFLOP/s against 99 in fp32 on the machine in docs/decisions.md). There the operands are widened,
the product runs in fp32 and its result is rounded: the same mathematics, and between products everything is still bf16.
"""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor

from bigtrain.processor import has_slow_bf16

SLOW_BF16 = has_slow_bf16()
"""Found at import: torch.compile does not trace what reads files."""


def widened(tensor: Tensor) -> bool:
    """Tell whether products of tensors such as this one run in fp32."""
    return SLOW_BF16 and tensor.dtype == torch.bfloat16 and tensor.device.type == "cpu"


def operand(tensor: Tensor, dtype: torch.dtype) -> Tensor:
    """Return a factor as products of this dtype read it: rounded to it, and widened to fp32 where they run so."""
    rounded = tensor.to(dtype)
    return rounded.float() if widened(rounded) else rounded


def mm(a: Tensor, b: Tensor, dtype: torch.dtype | None = None) -> Tensor:
    """Return a @ b, (n, k) by (k, m), in `dtype`, by default that of `a`, to which `b` is rounded.

    A wider result keeps the fp32 sums where the product has them: on CUDA and where operands are widened. Elsewhere it
    is rounded to the dtype of `a` first.
    """
    low, dtype = a.dtype, dtype or a.dtype
    if a.is_cuda and dtype == torch.float32 and low in (torch.float16, torch.bfloat16):
        return torch.mm(a, b.to(low), out_dtype=dtype)
    return (operand(a, low) @ operand(b, low)).to(dtype)


def linear(x: Tensor, weight: Tensor, bias: Tensor | None) -> Tensor:
    """Return x @ weight.T + bias, (..., k) by (m, k), in the dtype of `x`, to which weight and bias are rounded."""
    low = x.dtype
    bias = None if bias is None else operand(bias, low)
    return F.linear(operand(x, low), operand(weight, low), bias).to(low)
