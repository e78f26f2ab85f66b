"""Which type matrix products and activations have; weights, gradients and optimizer states stay fp32."""

from __future__ import annotations

import contextlib

import torch
from torch import nn

from bigtrain.errors import InputError


def autocast(precision: str, device_type: str) -> contextlib.AbstractContextManager[None]:
    """Return the context in which a forward pass runs at this precision, fp32 or bf16. Raises InputError for others."""
    if precision == "fp32":
        return contextlib.nullcontext()
    if precision != "bf16":
        raise InputError(f"amp.precision: {precision!r} is not in this version; use fp32 or bf16")
    return torch.autocast(device_type, dtype=torch.bfloat16)


def apply(model: nn.Module, precision: str) -> None:
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
