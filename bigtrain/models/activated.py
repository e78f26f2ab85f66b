"""Products that do not keep their input for the backward pass, but how to make it again from what is kept anyway.

On the CPU, where nothing fuses operations. N tokens, I features in, O features out, S numbers of a token in the source.
"""

from __future__ import annotations

from collections.abc import Callable
from functools import partial
from typing import Any, NamedTuple, Protocol

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.autograd.function import once_differentiable
from torch.autograd.graph import saved_tensors_hooks


class Activation(Protocol):
    """Elementwise work that keeps its input alone."""

    def __call__(self, x_NS: Tensor, /) -> Tensor:
        """Return the activation, (N, S) to (N, I), differentiable."""

    def gradient(self, grad_NI: Tensor, x_NS: Tensor, /) -> Tensor:
        """Return the gradient of x, (N, S), from that of the activation, which may be overwritten."""


class Source(NamedTuple):
    """What a tensor was made of, (N, S), which is kept for the backward pass anyway, and how, bit for bit."""

    x_NS: Tensor
    make: Callable[[Tensor], Tensor]


def normalized(norm: nn.Module, x_NW: Tensor) -> tuple[Tensor, Source | None]:
    """Return norm(x), (N, W), and x as its source where products may forget it; the norm keeps x itself."""
    return norm(x_NW), Source(x_NW.detach(), norm.forward) if _is_forgotten(x_NW) else None


def product(linear: nn.Module, x_NI: Tensor, source: Source | None = None) -> Tensor:
    """Return linear(x), (N, I) to (N, O).

    With a source, a plain layer on the CPU makes x again in the backward pass instead of keeping it. A compiler decides
    for itself what it keeps, and a block that is recomputed makes everything again anyway.
    """
    if source is None or not (_is_forgotten(x_NI) and _is_plain(linear, x_NI)):
        return _called(linear, x_NI)
    out_NO: Tensor = _Remade.apply(x_NI, linear.bias, linear.weight, *source)  # type: ignore[no-untyped-call]
    return out_NO


def activated(activation: Activation, x_NS: Tensor, linear: nn.Module) -> Tensor:
    """Return linear(activation(x)), (N, S) to (N, O), keeping x alone where `product` would.

    A quarter of a block's activations for a small share of its time. In a plain layer the gradient of the activation
    comes into the room of the activation itself.
    """
    if not _is_forgotten(x_NS):
        return _called(linear, activation(x_NS))
    if _is_plain(linear, x_NS):
        out_NO: Tensor = _Activated.apply(x_NS, linear.bias, linear.weight, activation)  # type: ignore[no-untyped-call]
        return out_NO
    hidden_NI = activation(x_NS)
    place, again = _place(hidden_NI), partial(activation, x_NS.detach())

    def pack(saved: Tensor) -> Any:
        return again if _place(saved) == place else saved

    with saved_tensors_hooks(pack, _unpack):
        return _called(linear, hidden_NI)


class _Remade(torch.autograd.Function):
    @staticmethod
    def forward(
        ctx: Any, x_NI: Tensor, bias_O: Tensor | None, weight_OI: Tensor, source_NS: Tensor, make: Callable[..., Tensor]
    ) -> Tensor:
        ctx.save_for_backward(source_NS, weight_OI)
        ctx.make = make
        return F.linear(x_NI, weight_OI, bias_O)

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, grad_NO: Tensor) -> tuple[Tensor | None, ...]:
        source_NS, weight_OI = ctx.saved_tensors
        grad_weight_OI = grad_NO.T @ ctx.make(source_NS)
        return grad_NO @ weight_OI, _bias_gradient(ctx, grad_NO), grad_weight_OI, None, None


class _Activated(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, x_NS: Tensor, bias_O: Tensor | None, weight_OI: Tensor, activation: Activation) -> Tensor:
        ctx.save_for_backward(x_NS, weight_OI)
        ctx.activation = activation
        return F.linear(activation(x_NS), weight_OI, bias_O)

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, grad_NO: Tensor) -> tuple[Tensor | None, ...]:
        x_NS, weight_OI = ctx.saved_tensors
        hidden_NI = ctx.activation(x_NS)
        grad_weight_OI = grad_NO.T @ hidden_NI
        torch.mm(grad_NO, weight_OI, out=hidden_NI)
        return ctx.activation.gradient(hidden_NI, x_NS), _bias_gradient(ctx, grad_NO), grad_weight_OI, None


def _bias_gradient(ctx: Any, grad_NO: Tensor) -> Tensor | None:
    return grad_NO.sum(0) if ctx.needs_input_grad[1] else None


def _is_forgotten(x: Tensor) -> bool:
    if x.device.type != "cpu" or torch.compiler.is_compiling() or not x.requires_grad:
        return False
    # Hooks are a stack of which the top alone is asked: those of a recomputed block must stay on top.
    return torch._C._autograd._top_saved_tensors_default_hooks(False) is None


def _is_plain(linear: nn.Module, x: Tensor) -> bool:
    """Tell whether a layer multiplies as torch's own does, with a weight that is trained and of the input's dtype."""
    if type(linear).forward is not nn.Linear.forward or linear._forward_pre_hooks or linear._forward_hooks:
        return False
    weight: Any = linear.weight
    return bool(weight.dtype == x.dtype and weight.requires_grad and x.dim() == 2)


def _called(linear: nn.Module, x_NI: Tensor) -> Tensor:
    out_NO: Tensor = linear(x_NI)
    return out_NO


def _unpack(saved: Any) -> Tensor:
    if isinstance(saved, Tensor):
        return saved
    with torch.no_grad():
        again: Tensor = saved()
    return again


def _place(tensor: Tensor) -> int:
    """Return what tells storages apart; fake tensors have no address."""
    identity: int = tensor.untyped_storage()._cdata
    return identity
