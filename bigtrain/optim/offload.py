"""From an optimizer on the device to one whose states are on the host, and with them the masters of narrow weights."""

from __future__ import annotations

import torch
from torch import Tensor
from torch.optim import Optimizer

from bigtrain.errors import InputError
from bigtrain.optim.piecewise import Piecewise
from bigtrain.optim.staging import Staging, host_tensors
from bigtrain.optim.weights import MASTER, Full, Mastered


def keep_on_host(
    optimizer: Optimizer,
    device: torch.device,
    *,
    everything: bool = False,
    dtype: torch.dtype | None = None,
    gradient_dtype: torch.dtype | None = None,
) -> None:
    """Keep what an optimizer keeps of each parameter in pinned host memory from now on.

    For the update it visits the device, a piece at a time: the same kernels on the same pieces, so the same numbers,
    bit for bit. Scalars, and the rows and columns of Adafactor, stay on the device. `everything` says that parameters
    and gradients are on the host as well.

    With `dtype` fp32 parameters become what computes, in that dtype, with gradients in `gradient_dtype` or the same;
    their fp32 values go to the host as `state[parameter]["master"]`, and an update writes both.

    Raises InputError for an optimizer that is not of bigtrain.optim, for one that has taken a step, and for masters of
    parameters that are not fp32.
    """
    if not isinstance(optimizer, Piecewise):
        name = type(optimizer).__name__
        raise InputError(
            f"sharding.offload: the states of {name} stay on the device; use an optimizer of bigtrain.optim, or none"
        )
    if optimizer.state:
        raise InputError(f"sharding.offload: a {type(optimizer).__name__} has taken steps; offload it before the first")
    optimizer.staging = Staging(device, everything=everything)
    if dtype is not None:
        if type(optimizer.weights) is not Full:
            raise InputError("sharding.offload: weights kept in bf16 are as they compute; use amp.master_weights=fp32")
        optimizer.weights = Mastered(dtype)
        for parameter in [parameter for group in optimizer.param_groups for parameter in group["params"]]:
            optimizer.state[parameter].update(host_tensors({MASTER: parameter}))
            optimizer.state[parameter][MASTER].copy_(parameter.detach())
            parameter.data = parameter.data.to(dtype)
            parameter.grad_dtype = gradient_dtype or dtype


def kept_weights(optimizer: Optimizer, parameter: Tensor) -> Tensor:
    """Return what a parameter's weights are kept in: its fp32 master, or itself.

    This is what a checkpoint has of it, whatever the offload; whoever loads one writes both.
    """
    master: Tensor | None = optimizer.state[parameter].get(MASTER) if parameter in optimizer.state else None
    return parameter.detach() if master is None else master
