"""A product of an activation of which only the input is kept: the backward pass computes the activation again.

N tokens, I width inside the MLP, W width.
"""

from __future__ import annotations

from collections.abc import Callable
from functools import partial
from typing import Any

import torch
from torch import Tensor, nn
from torch.autograd.graph import saved_tensors_hooks


def activated(activate: Callable[[Tensor], Tensor], x_NI: Tensor, linear: nn.Module) -> Tensor:
    """Return linear(activate(x)), (N, I) to (N, W); `activate` is elementwise work that keeps its input.

    On the CPU the product does not keep the activation for its weight's gradient, but how to compute it again, bit for
    bit: a quarter of a block's activations for a small share of its time. A compiler decides for itself what it keeps,
    and a block that is recomputed makes everything again anyway.
    """
    hidden_NI = activate(x_NI)
    if not _is_forgotten(hidden_NI):
        return _product(linear, hidden_NI)
    place, again = _place(hidden_NI), partial(activate, x_NI.detach())

    def pack(saved: Tensor) -> Any:
        return again if _place(saved) == place else saved

    with saved_tensors_hooks(pack, _unpack):
        return _product(linear, hidden_NI)


def _is_forgotten(hidden_NI: Tensor) -> bool:
    if hidden_NI.device.type != "cpu" or torch.compiler.is_compiling() or not hidden_NI.requires_grad:
        return False
    # Hooks are a stack of which the top alone is asked: those of a recomputed block must stay on top.
    return torch._C._autograd._top_saved_tensors_default_hooks(False) is None


def _product(linear: nn.Module, hidden_NI: Tensor) -> Tensor:
    out_NW: Tensor = linear(hidden_NI)
    return out_NW


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
