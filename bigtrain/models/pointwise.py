"""Elementwise work that keeps only its input for the backward pass: activations and root-mean-square norm.

N tokens of the flat row, W width, I width inside the MLP.
"""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import Any, Literal

import torch
import torch.nn.functional as F
from torch import Tensor, nn

TWICE = 2 * math.sqrt(2 / math.pi)
"""Twice what GELU by tanh multiplies x + 0.044715 x^3 with."""

PIECE_ELEMENTS = 2**18
"""Numbers that pass through several operations together: 1 MiB in fp32."""


@dataclass(frozen=True)
class GELU:
    """GELU (Hendrycks and Gimpel 2016, arXiv 1606.08415): exact, or by `tanh`."""

    approximate: Literal["none", "tanh"]

    def __call__(self, x_NI: Tensor) -> Tensor:
        """Apply it: (N, I) to (N, I). Half of the time of torch's own on the CPU by `tanh`, and within its rounding."""
        if self.approximate == "none" or not _is_eager_on_cpu(x_NI):
            return F.gelu(x_NI, approximate=self.approximate)
        out_NI: Tensor = _run(_TanhGELU, x_NI)
        return out_NI

    def gradient(self, grad_NI: Tensor, x_NI: Tensor) -> Tensor:
        """Return the gradient of x, in the place of that of the result."""
        backward = torch.ops.aten.gelu_backward.grad_input
        out_NI: Tensor = backward(grad_NI, x_NI, approximate=self.approximate, grad_input=grad_NI)
        return out_NI


@dataclass(frozen=True)
class SwiGLU:
    """Half of the numbers gate the other half: silu(gate) * up (Shazeer 2020, arXiv 2002.05202)."""

    def __call__(self, gate_up_NI2: Tensor) -> Tensor:
        """Apply it: (N, 2I) to (N, I). torch's own operations would also keep silu(gate), half as much again."""
        out_NI: Tensor = _run(_SwiGLU, gate_up_NI2)
        return out_NI

    def gradient(self, grad_NI: Tensor, gate_up_NI2: Tensor) -> Tensor:
        """Return the gradient of gate and up, (N, 2I)."""
        gate_NI, up_NI = gate_up_NI2.chunk(2, dim=-1)
        out_NI2 = torch.empty_like(gate_up_NI2)
        out_gate_NI, out_up_NI = out_NI2.chunk(2, dim=-1)
        out_up_NI.copy_(F.silu(gate_NI).mul_(grad_NI))
        out_gate_NI.copy_(torch.ops.aten.silu_backward(grad_NI * up_NI, gate_NI))
        return out_NI2


class _TanhGELU(torch.autograd.Function):
    """x sigmoid(2 sqrt(2/pi) (x + 0.044715 x^3)), the same function, a piece that stays in the cache at a time."""

    @staticmethod
    def compute(x_NI: Tensor) -> Tensor:
        out_NI = torch.empty_like(x_NI)
        rows = max(1, PIECE_ELEMENTS // max(1, x_NI[:1].numel()))
        first = x_NI.new_full((), TWICE)
        for x, out in zip(torch.split(x_NI, rows), torch.split(out_NI, rows), strict=True):
            torch.addcmul(first, x, x, value=TWICE * 0.044715, out=out)
            out.mul_(x).sigmoid_().mul_(x)
        return out_NI

    @staticmethod
    def forward(ctx: Any, x_NI: Tensor) -> Tensor:
        ctx.save_for_backward(x_NI)
        return _TanhGELU.compute(x_NI)

    @staticmethod
    def backward(ctx: Any, grad_NI: Tensor) -> Tensor:
        (x_NI,) = ctx.saved_tensors
        grad: Tensor = torch.ops.aten.gelu_backward(grad_NI, x_NI, approximate="tanh")
        return grad


def _is_eager_on_cpu(x: Tensor) -> bool:
    wide = x.dtype in (torch.float32, torch.float64)
    return x.device.type == "cpu" and wide and not torch.compiler.is_compiling()


class _SwiGLU(torch.autograd.Function):
    @staticmethod
    def compute(gate_up_NI2: Tensor) -> Tensor:
        gate_NI, up_NI = gate_up_NI2.chunk(2, dim=-1)
        return F.silu(gate_NI).mul_(up_NI)

    @staticmethod
    def forward(ctx: Any, gate_up_NI2: Tensor) -> Tensor:
        ctx.save_for_backward(gate_up_NI2)
        return _SwiGLU.compute(gate_up_NI2)

    @staticmethod
    def backward(ctx: Any, grad_NI: Tensor) -> Tensor:
        (gate_up_NI2,) = ctx.saved_tensors
        return SwiGLU().gradient(grad_NI, gate_up_NI2)


def _run(function: Any, x: Tensor) -> Tensor:
    """Return what a function computes of x; profiles tell by autograd's part of it where it is differentiated."""
    out: Tensor = function.apply(x) if torch.is_grad_enabled() else function.compute(x)
    return out


class RMSNorm(nn.RMSNorm):
    """Root-mean-square normalization (Zhang and Sennrich 2019, arXiv 1910.07467) over the last dim.

    On CUDA torch has one kernel for it; on the CPU its operations keep three tensors of the input's size, ours one.
    """

    def forward(self, x_NW: Tensor) -> Tensor:
        """Normalize each token: (N, W) to (N, W)."""
        if x_NW.device.type != "cpu":
            return super().forward(x_NW)
        out_NW: Tensor = _RMSNorm.apply(x_NW, self.weight, self.eps)  # type: ignore[no-untyped-call]
        return out_NW


class _RMSNorm(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, x_NW: Tensor, weight_W: Tensor, eps: float) -> Tensor:
        wide = torch.promote_types(x_NW.dtype, torch.float32)
        inverse_N1 = x_NW.to(wide).square().mean(-1, keepdim=True).add_(eps).rsqrt_()
        ctx.save_for_backward(x_NW, weight_W, inverse_N1)
        return (x_NW * inverse_N1).mul_(weight_W).to(x_NW.dtype)

    @staticmethod
    def backward(ctx: Any, grad_NW: Tensor) -> tuple[Tensor, Tensor, None]:
        x_NW, weight_W, inverse_N1 = ctx.saved_tensors
        scaled_NW = x_NW * inverse_N1
        slope_NW = grad_NW * scaled_NW
        grad_weight_W = slope_NW.sum(0).to(weight_W.dtype)
        mean_N1 = slope_NW.mul_(weight_W).mean(-1, keepdim=True)
        out_NW = scaled_NW.mul_(mean_N1).sub_(grad_NW * weight_W).mul_(-inverse_N1)
        return out_NW.to(x_NW.dtype), grad_weight_W, None
