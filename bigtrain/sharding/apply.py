"""From a model to one of which each rank holds a part, in place: every ZeRO stage by torch's `fully_shard`."""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from typing import Any

import torch
from torch import Tensor, nn
from torch.distributed import ProcessGroup
from torch.distributed.device_mesh import DeviceMesh
from torch.distributed.fsdp import (
    FSDPModule,
    MixedPrecisionPolicy,
    fully_shard,
    register_fsdp_forward_method,
)

from bigtrain.distributed_tensors import local_part
from bigtrain.errors import InputError
from bigtrain.sharding.cost import RESHARDING_STAGES, STAGES, local_shape
from bigtrain.sharding.offload import pin, policy_of
from bigtrain.sharding.part import Part

OTHER_FORWARDS = ("evaluate", "logits")
"""Methods of models that run a forward pass without being called as one: parameters are gathered for them, too."""


class Sharded:
    """A model that `shard` has cut up, and what its ranks exchange in which backward pass.

    `parameters` are this rank's rows of each parameter by name, plain tensors in the same memory, for an optimizer;
    some are empty. `parts` say which rows they are.
    """

    def __init__(self, model: FSDPModule, mesh: DeviceMesh, zero_stage: int) -> None:
        assert isinstance(model, nn.Module)
        self.model, self.mesh, self.zero_stage = model, mesh, zero_stage
        self.whole = dict(model.named_parameters())
        local = local_parameters(self.whole.values())
        self.parameters: dict[str, nn.Parameter] = dict(zip(self.whole, local, strict=True))
        self.parts = {name: self._part(parameter) for name, parameter in self.whole.items()}

    @property
    def shards(self) -> int:
        """Return how many ranks share each parameter."""
        return self.mesh.size(-1)

    @property
    def shard_rank(self) -> int:
        """Return which of the parts this rank has."""
        return self.mesh.get_local_rank(self.mesh.ndim - 1)

    @property
    def replicate(self) -> int:
        """Return how many groups of ranks have a whole model each."""
        return self.mesh.size() // self.shards

    @property
    def group(self) -> ProcessGroup:
        """Return the ranks that share each parameter."""
        return self.mesh.get_group(self.mesh.ndim - 1)

    def before_micro_batch(self, *, last: bool) -> None:
        """Say, before each forward pass, whether it is the last one of an optimizer step.

        Stage 1 sums gradients over ranks in the last one's backward pass alone. All stages sum over replicas there
        alone. Stages 1 and 2 gather the parameters in a step's first forward pass and let go of them after its last
        backward pass; the others in every one.
        """
        self.model.set_requires_gradient_sync(last or self.zero_stage != 1)
        self.model.set_requires_all_reduce(last)
        self.model.set_reshard_after_backward(last or self.zero_stage in RESHARDING_STAGES)

    def hand_over(self) -> None:
        """Move the gradients that a backward pass has left to `parameters`."""
        hand_over_gradients(self.whole.values(), self.parameters.values())

    def _part(self, parameter: nn.Parameter) -> Part:
        whole, shape = tuple(parameter.shape), tuple(local_part(parameter.detach()).shape)
        if not whole:
            return Part.of_whole(whole)
        first = min(self.shard_rank * local_shape(whole, self.shards)[0], whole[0])
        return Part(whole, (first, *(0 for _ in whole[1:])), shape)


def shard(
    model: nn.Module,
    blocks: Sequence[nn.Module],
    mesh: DeviceMesh,
    *,
    zero_stage: int,
    dtype: torch.dtype | None = None,
    reduce_dtype: torch.dtype = torch.float32,
    offload: str = "none",
    rows: Mapping[str, Tensor] | None = None,
) -> Sharded:
    """Cut each parameter of a model by rows over the mesh's last dim; a first one of two dims holds replicas.

    `blocks` are gathered one by one, what is outside of them together. `dtype` is what parameters compute in where that
    is not what they are kept in. With `offload` "all" this rank's parts and their gradients are in host memory; blocks
    fetch theirs. `rows` are this rank's of each parameter of a model on the meta device, which then is never whole
    anywhere; it may have no tied parameters. Precision and recomputation are applied before, the optimizer is made
    afterwards, of `local_parameters`. Raises InputError for a stage that does not exist, and for another mesh.
    """
    if zero_stage not in STAGES:
        raise InputError(f"sharding.zero_stage: {zero_stage} is none of {', '.join(map(str, STAGES))}")
    if mesh.ndim not in (1, 2) or (zero_stage == 0 and mesh.size(-1) > 1):
        use = "(replicate, 1)" if zero_stage == 0 else "(shards,) or (replicate, shards)"
        raise InputError(f"sharding: a mesh of shape {tuple(mesh.shape)} for stage {zero_stage}; use {use}")
    policy = MixedPrecisionPolicy(param_dtype=dtype, reduce_dtype=reduce_dtype, cast_forward_inputs=False)
    policies: dict[str, Any] = {"mp_policy": policy, "offload_policy": policy_of(offload)}
    for block in blocks:
        fully_shard(block, mesh=mesh, **policies, reshard_after_forward=zero_stage in RESHARDING_STAGES)
    root = fully_shard(model, mesh=mesh, **policies, reshard_after_forward=False)
    if rows:
        _fill(model, torch.device("cpu" if offload == "all" else mesh.device_type), rows)
    if offload == "all":
        pin(model, torch.device(mesh.device_type))
    for method in OTHER_FORWARDS:
        if hasattr(model, method):
            register_fsdp_forward_method(model, method)
    return Sharded(root, mesh, zero_stage)


def _fill(model: nn.Module, device: torch.device, rows: Mapping[str, Tensor]) -> None:
    """Create this rank's parts of a sharded model on the meta device; buffers stay what they are."""
    buffers = [(module, dict(module._buffers)) for module in model.modules()]
    model.to_empty(device=device)
    for module, kept in buffers:
        module._buffers.update(kept)
    for name, parameter in model.named_parameters():
        local_part(parameter.detach()).copy_(rows[name])


def local_parameters(parameters: Iterable[nn.Parameter]) -> list[nn.Parameter]:
    """Return this rank's rows of each parameter, plain tensors in the same memory, for an optimizer; some are empty."""
    return [nn.Parameter(local_part(parameter.detach())) for parameter in parameters]


def hand_over_gradients(parameters: Iterable[nn.Parameter], local: Iterable[nn.Parameter]) -> None:
    """Move the gradients of sharded parameters to what `local_parameters` returned for them."""
    for parameter, mine in zip(parameters, local, strict=True):
        mine.grad = None if parameter.grad is None else local_part(parameter.grad)
        parameter.grad = None
