"""How a model is spread over ranks: the products of its blocks over neighbours, rows over the rest."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from datetime import timedelta
from typing import TYPE_CHECKING

import torch
import torch.distributed as dist
from torch import Tensor, nn
from torch.distributed.device_mesh import DeviceMesh, init_device_mesh
from torch.distributed.distributed_c10d import _set_pg_timeout
from torch.optim import Optimizer

from bigtrain.amp.precision import DTYPES
from bigtrain.heartbeat import collective_seconds
from bigtrain.memory.layout import layout_of
from bigtrain.models.shape import shared_products
from bigtrain.optim.exchange import Exchange, check_elementwise, connect
from bigtrain.optim.offload import keep_on_host
from bigtrain.placement import Cut
from bigtrain.planner.plan import Plan
from bigtrain.sharding.part import Part, Shape
from bigtrain.sharding.rows import rows_of
from bigtrain.sharding.tensor import TensorShared, cuts_of, share
from bigtrain.sharding.tensor import cut as cut_product
from bigtrain.world import World

if TYPE_CHECKING:
    from bigtrain.sharding.apply import Sharded

DATA_DIMS = ("replicate", "shard")
TENSOR_DIM = "tensor"


@dataclass(frozen=True)
class Spread:
    """What this rank has of a model, and which others have the same, or the rest.

    Neighbours are those that share products, then those that share rows; `replicate` such groups have a model each.
    """

    model: nn.Module
    world: World
    shared: TensorShared | None = None
    sharded: Sharded | None = None

    @property
    def parameters(self) -> dict[str, nn.Parameter]:
        """Return what the optimizer holds, by name: this rank's part of each parameter, a plain tensor."""
        return dict(self.model.named_parameters()) if self.sharded is None else self.sharded.parameters

    @property
    def parts(self) -> dict[str, Part]:
        """Return which part of each parameter that is."""
        found = {name: Part.of_whole(tuple(parameter.shape)) for name, parameter in self.parameters.items()}
        if self.sharded is not None:
            found = self.sharded.parts
        return found if self.shared is None else {name: self.shared.part(name, rows) for name, rows in found.items()}

    @property
    def shards(self) -> int:
        """Return how many ranks have the model between them."""
        return self._tensor_ranks * (1 if self.sharded is None else self.sharded.shards)

    @property
    def shard_rank(self) -> int:
        """Return which of them this rank is."""
        rows = 0 if self.sharded is None else self.sharded.shard_rank
        return rows * self._tensor_ranks + (0 if self.shared is None else self.shared.rank)

    @property
    def reader(self) -> int:
        """Return which rows this rank reads, and draws random numbers for: those that share products have the same."""
        return self.world.reading(self._tensor_ranks)[0]

    @property
    def own(self) -> frozenset[str]:
        """Return the parameters whose part no rank before this one has, of those that have the model between them."""
        first = self.shared is None or self.shared.rank == 0
        return frozenset(name for name in self.parameters if first or self.copies(name) == 1)

    def copies(self, name: str) -> int:
        """Return how many of the ranks that share products have the same numbers of a parameter."""
        return 1 if self.shared is None else self.shared.copies(name)

    @property
    def replicate(self) -> int:
        """Return how many groups of ranks have a whole model each."""
        return 1 if self.sharded is None else self.sharded.replicate

    @property
    def _tensor_ranks(self) -> int:
        return 1 if self.shared is None else self.shared.ranks


def mesh_of(plan: Plan) -> DeviceMesh | None:
    """Return a plan's ranks in dims `replicate`, `shard` and `tensor`, those that it has; all ranks call it."""
    ranks, layout = plan.recipe.sharding.tensor_parallel, layout_of(plan.recipe, plan.world_size)
    if layout.alone and ranks == 1:
        return None
    if not dist.is_initialized():  # one process whose blocks fetch their weights from the host: a group of its own
        backend = "gloo" if plan.hardware.kind == "cpu" else "cpu:gloo,cuda:nccl"
        dist.init_process_group(backend, store=dist.HashStore(), rank=0, world_size=1)  # type: ignore[attr-defined]
    dims, names = ((), ()) if layout.alone else (layout.mesh, DATA_DIMS[-len(layout.mesh) :])
    if ranks > 1:
        dims, names = (*dims, ranks), (*names, TENSOR_DIM)
    mesh = init_device_mesh(plan.hardware.kind, dims, mesh_dim_names=names)
    for group in mesh.get_all_groups():  # those of fewer ranks than all would wait for half an hour
        _set_pg_timeout(timedelta(seconds=collective_seconds(plan.recipe.cluster.timeout)), group)
    return mesh


def make_equal(model: nn.Module, world: World) -> None:
    """Give all ranks the first one's weights and buffers, unless the model is yet to be created, from the seed."""
    tensors = [*model.parameters(), *model.buffers()]
    if world.size > 1 and not any(tensor.is_meta for tensor in tensors):
        for tensor in tensors:
            dist.broadcast(tensor.detach(), 0)


def cut_of(model: nn.Module, plan: Plan, blocks: Sequence[nn.Module], mesh: DeviceMesh | None) -> Cut | None:
    """Return what leaves this rank's rows of each parameter as it is created; None where no rank has rows alone.

    Of what ranks share as products it is rows of this rank's share. Not where parameters are tied, whose one part torch
    would create several times.
    """
    layout = layout_of(plan.recipe, plan.world_size)
    parameters = [name for name, _ in model.named_parameters(remove_duplicate=False)]
    tied = len(parameters) > len(dict(model.named_parameters()))
    if mesh is None or layout.shards == 1 or tied:
        return None
    rank, sharing = mesh.get_local_rank(DATA_DIMS[-1]), plan.recipe.sharding.tensor_parallel
    tensor_rank = mesh.get_local_rank(TENSOR_DIM) if sharing > 1 else 0
    products = cuts_of(model, blocks, shared_products(plan.model), sharing) if sharing > 1 else {}

    def cut(name: str, tensor: Tensor) -> Tensor:
        if name in products:
            tensor = cut_product(tensor, *products[name], tensor_rank, sharing)
        part = rows_of(tuple(tensor.shape), rank, layout.shards)
        return tensor.narrow(0, part.start[0], part.shape[0]).clone() if part.whole else tensor.clone()

    return cut


def share_products(
    model: nn.Module, plan: Plan, blocks: Sequence[nn.Module], mesh: DeviceMesh | None
) -> TensorShared | None:
    """Cut the products of a plan's blocks among neighbours, if it has them share any; `connect` is to follow."""
    if mesh is None or TENSOR_DIM not in (mesh.mesh_dim_names or ()):
        return None
    return share(model, blocks, shared_products(plan.model), mesh.get_group(TENSOR_DIM))


def shard_rows(
    model: nn.Module,
    plan: Plan,
    blocks: Sequence[nn.Module],
    mesh: DeviceMesh | None,
    rows: Mapping[str, Tensor] | None = None,
) -> Sharded | None:
    """Cut what a rank has by rows as a plan says, if several ranks read rows of their own.

    `rows` are what `cut_of` has left of each parameter, where it was asked.
    """
    recipe, layout = plan.recipe, layout_of(plan.recipe, plan.world_size)
    if mesh is None or layout.alone:
        return None
    from bigtrain.sharding.apply import (
        shard,  # torch's sharding: 40 MB of resident memory that one process does without
    )

    names = tuple(name for name in mesh.mesh_dim_names or () if name in DATA_DIMS)
    data = mesh if names == mesh.mesh_dim_names else mesh[names]
    dtype = DTYPES[recipe.amp.precision] if layout.converting else None
    reduce_dtype = torch.bfloat16 if recipe.amp.reduce == "bf16" else torch.float32
    return shard(
        model,
        blocks,
        data,
        zero_stage=layout.zero_stage,
        dtype=dtype,
        reduce_dtype=reduce_dtype,
        offload=layout.offload,
        rows=rows,
    )


def connect_parts(optimizer: Optimizer, sharded: Sharded | None, shared: TensorShared | None) -> None:
    """Let an optimizer of parts update them as whole parameters are updated. Raises InputError for one that cannot."""
    if shared is not None:
        check_elementwise(optimizer, "sharding.tensor_parallel", "1")
    elif sharded is not None and sharded.shards > 1:
        wholes: dict[Tensor, Shape] = {sharded.parameters[name]: part.whole for name, part in sharded.parts.items()}
        connect(optimizer, Exchange(sharded.group, wholes))


def offload_states(optimizer: Optimizer, plan: Plan, model: nn.Module, sharded: Sharded | None) -> None:
    """Keep in host memory what a plan says; the device keeps weights in the dtype in which they compute."""
    recipe, layout = plan.recipe, layout_of(plan.recipe, plan.world_size)
    narrowed = recipe.amp.master_weights == "fp32" and layout.kept_bytes < torch.float32.itemsize
    low = DTYPES[recipe.amp.precision] if narrowed else None
    wide = torch.float32 if layout.alone and layout.accumulated else None
    device = torch.device(plan.hardware.kind)
    keep_on_host(optimizer, device, everything=layout.streaming, dtype=low, gradient_dtype=wide)
    if low is not None and sharded is not None:
        from bigtrain.sharding.offload import narrow

        narrow(model, list(sharded.parameters.values()), low)
