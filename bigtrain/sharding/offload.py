"""What `fully_shard` keeps of a model, in pinned host memory of exactly its size, or in the dtype that computes.

torch has its own pinned memory, which rounds each tensor up to a power of two, so weights are moved to buffers of ours
before the first forward pass. That reaches into FSDP2's parameters, which have no public way: `pin` is all that does.
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator
from typing import Any

import torch
from torch import Tensor, nn
from torch.distributed.fsdp import CPUOffloadPolicy, FSDPModule, OffloadPolicy

from bigtrain import pinned
from bigtrain.distributed_tensors import is_distributed


def policy_of(offload: str) -> OffloadPolicy:
    """Return torch's policy for `sharding.offload`: what is not the optimizer's moves with `all` alone."""
    return CPUOffloadPolicy(pin_memory=False) if offload == "all" else OffloadPolicy()


def pin(model: nn.Module, device: torch.device) -> None:
    """Move this rank's parts, which `CPUOffloadPolicy(pin_memory=False)` has left on the host, to pinned memory.

    From there copies to the device run beside what computes, and gradients leave likewise, to torch's pinned memory.
    Where the device is the CPU this is memory like any other.
    """
    for kept in _kept(model):
        padded: Tensor = kept._sharded_param_data
        moved = pinned.allocate(padded.nbytes).view(padded.dtype)
        moved.copy_(padded)
        local: Tensor = kept.sharded_param._local_tensor
        kept._sharded_param_data = moved
        kept.sharded_param._local_tensor = moved[: local.numel()].view(local.shape)
        kept.pin_memory = device.type == "cuda"


def narrow(model: nn.Module, local: Iterable[nn.Parameter], dtype: torch.dtype) -> None:
    """Keep this rank's parts of a sharded model in the dtype that computes, before its first forward pass.

    `local` are plain tensors of them, in the order of the model's parameters, as an optimizer has them: they are tied
    to the new memory. The wider values are gone; whoever wants them, the optimizer as masters, takes them before.
    """

    def narrowed(tensor: Tensor) -> Tensor:
        return tensor.to(dtype) if is_distributed(tensor) and tensor.is_floating_point() else tensor

    model._apply(narrowed)  # type: ignore[no-untyped-call]
    for parameter, mine in zip(model.parameters(), local, strict=True):
        sharded: Any = parameter.detach()
        mine.data = sharded.to_local()


def _kept(model: nn.Module) -> Iterator[Any]:
    """Yield what FSDP2 keeps of each parameter."""
    for module in model.modules():
        if isinstance(module, FSDPModule):
            state: Any = module._get_fsdp_state()
            groups = getattr(state, "_fsdp_param_groups", None)  # since torch 2.12; before, one or none
            for group in [state._fsdp_param_group] if groups is None else groups:
                yield from group.fsdp_params if group is not None else ()
