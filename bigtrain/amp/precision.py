"""From a model to one that computes at a precision, in place."""

from __future__ import annotations

import torch
from torch import nn

from bigtrain.amp.modules import plain_modules, round_modules
from bigtrain.amp.rules import device_fault, master_weights_fault
from bigtrain.errors import InputError

DTYPES = {"bf16": torch.bfloat16, "fp16": torch.float16, "fp8": torch.bfloat16}
"""What activations are; at fp8 the products in the blocks round further."""


def apply(model: nn.Module, precision: str, *, master_weights: str = "fp32", accumulated: bool = False) -> None:
    """Make a model compute at this precision, on whatever device its first parameter is.

    Parameters stay the objects they are, tied ones tied, under the same names. With fp32 master weights they are fp32,
    and each module reads them rounded, through copies that live only while it computes; else they are bf16 themselves.
    Gradients are in the dtype of the parameters, or fp32 where those of several micro-batches are `accumulated`.
    Applying again replaces what was applied before, but for fp8's layers, which stay. Raises InputError where the
    device or the library cannot, where weights cannot be kept so, and for a model without parameters.
    """
    first = next(model.parameters(), None)
    if first is None:
        raise InputError(f"amp: a {type(model).__name__} without parameters computes in the precision of its input")
    device = first.device
    capability = torch.cuda.get_device_capability(device) if device.type == "cuda" else None
    if fault := device_fault(precision, device.type, capability):
        raise InputError(f"amp.precision: {fault}")
    if fault := master_weights_fault(precision, master_weights):
        raise InputError(f"amp.master_weights: {fault}")
    plain_modules(model)
    if precision == "fp8":
        from bigtrain.amp.float8 import convert

        convert(model)
    if precision != "fp32":
        round_modules(model, DTYPES[precision])
    for parameter in model.parameters():
        keep(parameter, master_weights, accumulated=accumulated)


def keep(parameter: nn.Parameter, master_weights: str, *, accumulated: bool) -> None:
    """Give a parameter the dtype in which it is kept; a low-precision one is widened where it is to be the master.

    `apply` does so for all of a model; done before as each is initialised, fp32 weights are never there all at once.
    """
    if not parameter.is_floating_point():
        return
    wide = torch.promote_types(parameter.dtype, torch.float32)
    dtype = wide if master_weights == "fp32" else torch.bfloat16
    if parameter.dtype != dtype:
        parameter.data = parameter.data.to(dtype)
    gradient_dtype = wide if accumulated else dtype
    if parameter.grad_dtype != gradient_dtype:
        parameter.grad_dtype = gradient_dtype
