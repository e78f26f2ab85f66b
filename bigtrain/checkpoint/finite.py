"""No checkpoint holds a number that is not finite: looked at before anything of it is written."""

from __future__ import annotations

import platform
from collections.abc import Iterable, Mapping

import torch
from torch import Tensor

from bigtrain.errors import BigtrainError
from bigtrain.world import World


def check_finite(step: int, tensor_files: Mapping[str, Mapping[str, Tensor]], world: World) -> None:
    """Raise BigtrainError, on all ranks, if a tensor that any of them is to write holds a NaN or an infinity.

    One pass over what is written, where it is, without a copy.
    """
    found = first_not_finite((name, tensor) for content in tensor_files.values() for name, tensor in content.items())
    if not world.any(found is not None):
        return
    told = world.gather("" if found is None else f"rank {world.rank} on {platform.node()}: {found}")
    where = next(text for text in told if text)
    raise BigtrainError(f"step {step} was not saved: {where} holds a number that is not finite")


def first_not_finite(tensors: Iterable[tuple[str, Tensor]]) -> str | None:
    """Return the name of the first tensor that holds a NaN or an infinity, None if all are finite."""
    named = [(name, tensor) for name, tensor in tensors if tensor.is_floating_point() and tensor.numel()]
    finite = [torch.stack(torch.aminmax(tensor.detach())).isfinite().all() for _, tensor in named]  # a NaN is both
    return next((name for (name, _), good in zip(named, _fetched(finite), strict=True) if not good), None)


def _fetched(flags: list[Tensor]) -> Iterable[Tensor]:
    """Return flags on the host; those of one device all at once."""
    if len({flag.device for flag in flags}) == 1:
        return torch.stack(flags).cpu()
    return [flag.cpu() for flag in flags]
