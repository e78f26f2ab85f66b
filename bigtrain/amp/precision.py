"""Which type matrix products and activations have; weights, gradients and optimizer states stay fp32."""

from __future__ import annotations

import contextlib
from typing import Literal

import torch
from torch import nn

Precision = Literal["fp32", "bf16"]


def autocast(precision: Precision, device_type: str) -> contextlib.AbstractContextManager[None]:
    """Return the context in which a forward pass runs at this precision."""
    if precision == "fp32":
        return contextlib.nullcontext()
    return torch.autocast(device_type, dtype=torch.bfloat16)


def apply(model: nn.Module, precision: Precision) -> None:
    """Make a module's forward pass run at this precision, on whatever device its first parameter is.

    The module is changed in place; fp32 leaves it as it is.
    """
    if precision == "fp32":
        return
    plain_forward = model.forward
    device_type = next(model.parameters()).device.type

    def forward(*args: object, **kwargs: object) -> object:
        with autocast(precision, device_type):
            return plain_forward(*args, **kwargs)

    model.forward = forward
