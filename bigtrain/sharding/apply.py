"""From a model to one of which each rank holds a part, in place: every ZeRO stage by torch's `fully_shard`."""

from __future__ import annotations

from collections.abc import Iterable, Sequence

import torch
from torch import Tensor, nn
from torch.distributed.device_mesh import DeviceMesh
from torch.distributed.fsdp import FSDPModule, MixedPrecisionPolicy, fully_shard
from torch.distributed.tensor import DTensor

from bigtrain.errors import InputError
from bigtrain.sharding.cost import RESHARDING_STAGES, STAGES


class Sharded:
    """A model that `shard` has cut up, and what its ranks exchange in which backward pass."""

    def __init__(self, model: FSDPModule, zero_stage: int) -> None:
        self.model, self.zero_stage = model, zero_stage

    def before_micro_batch(self, *, last: bool) -> None:
        """Say, before each forward pass, whether it is the last one of an optimizer step.

        Stage 1 sums gradients over ranks in the last one's backward pass alone. All stages sum over replicas there
        alone. Stages 1 and 2 gather the parameters in a step's first forward pass and let go of them after its last
        backward pass; the others in every one.
        """
        self.model.set_requires_gradient_sync(last or self.zero_stage != 1)
        self.model.set_requires_all_reduce(last)
        self.model.set_reshard_after_backward(last or self.zero_stage in RESHARDING_STAGES)


def shard(
    model: nn.Module,
    blocks: Sequence[nn.Module],
    mesh: DeviceMesh,
    *,
    zero_stage: int,
    dtype: torch.dtype | None = None,
    reduce_dtype: torch.dtype = torch.float32,
) -> Sharded:
    """Cut each parameter of a model by rows over the mesh's last dim; a first one of two dims holds replicas.

    `blocks` are gathered one by one, what is outside of them together. `dtype` is what parameters compute in where that
    is not what they are kept in. Precision and recomputation are applied before, the optimizer is made afterwards, of
    `local_parameters`. Raises InputError for a stage that does not exist, and for another mesh.
    """
    if zero_stage not in STAGES:
        raise InputError(f"sharding.zero_stage: {zero_stage} is none of {', '.join(map(str, STAGES))}")
    if mesh.ndim not in (1, 2) or (zero_stage == 0 and mesh.size(-1) > 1):
        use = "(replicate, 1)" if zero_stage == 0 else "(shards,) or (replicate, shards)"
        raise InputError(f"sharding: a mesh of shape {tuple(mesh.shape)} for stage {zero_stage}; use {use}")
    policy = MixedPrecisionPolicy(param_dtype=dtype, reduce_dtype=reduce_dtype, cast_forward_inputs=False)
    for block in blocks:
        fully_shard(block, mesh=mesh, mp_policy=policy, reshard_after_forward=zero_stage in RESHARDING_STAGES)
    return Sharded(fully_shard(model, mesh=mesh, mp_policy=policy, reshard_after_forward=False), zero_stage)


def local_parameters(parameters: Iterable[nn.Parameter]) -> list[nn.Parameter]:
    """Return this rank's rows of each parameter, plain tensors in the same memory, for an optimizer; some are empty."""
    return [nn.Parameter(_local(parameter.detach())) for parameter in parameters]


def hand_over_gradients(parameters: Iterable[nn.Parameter], local: Iterable[nn.Parameter]) -> None:
    """Move the gradients of sharded parameters to what `local_parameters` returned for them."""
    for parameter, mine in zip(parameters, local, strict=True):
        mine.grad = None if parameter.grad is None else _local(parameter.grad)
        parameter.grad = None


def _local(tensor: Tensor) -> Tensor:
    if not isinstance(tensor, DTensor):
        return tensor
    local: Tensor = tensor.to_local()
    return local
