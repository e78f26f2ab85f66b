"""A rank's rows of a tensor, cut as `fully_shard` cuts, taken from all of it and put together again."""

from __future__ import annotations

import torch
import torch.distributed as dist
from torch import Tensor

from bigtrain.sharding.cost import local_shape
from bigtrain.sharding.part import Part, Shape


def rows_of(whole: Shape, rank: int, ranks: int) -> Part:
    """Return which rows of a tensor a rank has: rounded up, so that the last ranks may have fewer, or none."""
    if not whole:
        return Part.of_whole(whole)
    rows = local_shape(whole, ranks)[0]
    first = min(rank * rows, whole[0])
    return Part(whole, (first, *(0 for _ in whole[1:])), (min(rows, whole[0] - first), *whole[1:]))


def take_rows(tensor: Tensor, part: Part) -> Tensor:
    """Return the rows of a part, in host memory of their own."""
    rows = tensor.narrow(0, part.start[0], part.shape[0]) if part.whole else tensor
    return rows.detach().to("cpu", copy=True)


def join_rows(rows: Tensor, part: Part, device: torch.device) -> Tensor:
    """Return all of a tensor on a device, from the rows that each rank of the default group has; all call it."""
    ranks = dist.get_world_size()
    if not part.whole or ranks == 1:
        return rows.to(device)
    padded = torch.zeros(local_shape(part.whole, ranks), dtype=rows.dtype, device=device)
    padded[: len(rows)] = rows
    parts = [torch.empty_like(padded) for _ in range(ranks)]
    dist.all_gather(parts, padded)
    return torch.cat(parts)[: part.whole[0]]
