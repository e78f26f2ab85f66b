"""Values that a test has changed at a fault point: a loss, gradients, a bit of the weights. Off unless asked for."""

from __future__ import annotations

from collections.abc import Iterable
from typing import Any

import torch
from torch import Tensor

from bigtrain.batch import PairLosses
from bigtrain.fault_points import reached


def changed(output: Any, step: int) -> Any:
    """Return what a micro-batch's forward pass has given, or its loss if a fault changes that or its gradients.

    `loss:change=X` multiplies the loss by X, `gradient:change=X` all gradients that flow from it, the loss unchanged.
    """
    by, gradients_by = reached("loss", step), reached("gradient", step)
    if by is None and gradients_by is None:
        return output
    if isinstance(output, PairLosses):
        return PairLosses(*(_changed(loss, by, gradients_by) for loss in output))
    return _changed(output if isinstance(output, Tensor) else output.loss, by, gradients_by)


def _changed(loss: Tensor, by: float | None, gradients_by: float | None) -> Tensor:
    if by is not None:
        loss = loss * by
    if gradients_by is not None:
        loss.register_hook(lambda gradient: gradient * gradients_by)  # type: ignore[no-untyped-call]
    return loss


def flip_asked_bit(tensors: Iterable[Tensor], step: int) -> None:
    """Flip the bit that `weights:change=INDEX` names, counted through these tensors one after another."""
    index = reached("weights", step)
    if index is not None:
        flip_bit(tensors, int(index))


def flip_bit(tensors: Iterable[Tensor], index: int) -> None:
    """Flip one bit in place; raise IndexError if the tensors have fewer."""
    for tensor in tensors:
        memory = tensor.detach().view(-1).view(torch.uint8)
        if index < 8 * memory.numel():
            memory[index // 8] ^= 1 << index % 8
            return
        index -= 8 * memory.numel()
    raise IndexError("the tensors have fewer bits")
