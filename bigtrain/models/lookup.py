"""The token embedding where its matrix is also the head's: one gradient for both uses.

N tokens of the flat row, V vocabulary, padded, W width.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor


class Lookup:
    """One forward's lookup in a matrix that the head uses too.

    The head is differentiated first and leaves its gradient (V, W) here; the lookup adds its rows to it, so that two
    gradients of the largest matrix never exist side by side, and whoever waits for the weight's gradient gets it once.
    """

    def __init__(self) -> None:
        self.gradient: Tensor | None = None

    def __call__(self, index_N: Tensor, weight_VW: Tensor) -> Tensor:
        """Return one row for each index, (N, W)."""
        rows_NW: Tensor = _Rows.apply(weight_VW, index_N, self)  # type: ignore[no-untyped-call]
        return rows_NW


class _Rows(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, weight_VW: Tensor, index_N: Tensor, lookup: Lookup) -> Tensor:
        ctx.save_for_backward(index_N)
        ctx.shape, ctx.dtype, ctx.lookup = weight_VW.shape, weight_VW.dtype, lookup
        return weight_VW.index_select(0, index_N)

    @staticmethod
    def backward(ctx: Any, grad_NW: Tensor) -> tuple[Tensor, None, None]:
        (index_N,) = ctx.saved_tensors
        grad_VW, ctx.lookup.gradient = ctx.lookup.gradient, None
        if grad_VW is None:
            grad_VW = grad_NW.new_zeros(ctx.shape, dtype=ctx.dtype)
        rows_NW = grad_NW.to(grad_VW.dtype)
        if grad_VW.device.type == "cpu":
            grad_VW.index_add_(0, index_N, rows_NW)
        else:  # sorted, and so the same in every run: index_add_ is not, on CUDA
            grad_VW.index_put_((index_N,), rows_NW, accumulate=True)
        return grad_VW, None, None
