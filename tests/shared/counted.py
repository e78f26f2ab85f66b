"""Collectives counted where torch hands them to a backend: of a real process group or of a made-up one."""

from __future__ import annotations

from collections import Counter
from collections.abc import Mapping
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor
from torch.utils._python_dispatch import TorchDispatchMode

KINDS = {"_allgather_base_": "all_gather", "_reduce_scatter_base_": "reduce_scatter", "allreduce_": "all_reduce"}
"""Of torch's own operators, which all versions share."""


class Sent(TorchDispatchMode):
    """Counts collectives of tensors by kind and number of ranks, and the bytes that a ring makes a rank send.

    What ranks agree on are left out: fp64 numbers, which no parameter is, and single ones.
    """

    def __init__(self) -> None:
        super().__init__()
        self.calls: Counter[str] = Counter()
        self.bytes: Counter[str] = Counter()

    def __torch_dispatch__(
        self, func: Any, types: Any, args: tuple[Any, ...] = (), kwargs: Mapping[str, Any] | None = None
    ) -> Any:
        kind = KINDS.get(func._schema.name.removeprefix("c10d::"))
        if kind is not None and all(t.dtype != torch.float64 and t.ndim for t in tensors_of(args)):
            ranks, size = group_of(args).size(), max(map(size_of, tensors_of(args)))
            self.calls[f"{kind} {ranks}"] += 1
            self.bytes[f"{kind} {ranks}"] += (2 if kind == "all_reduce" else 1) * size * (ranks - 1) // ranks
        return func(*args, **(kwargs or {}))


def group_of(args: tuple[Any, ...]) -> dist.ProcessGroup:
    """Return the ranks that a collective is called for."""
    scripted = [each for each in args if isinstance(each, torch.ScriptObject)]
    return dist.ProcessGroup.unbox(next(each for each in scripted if "ProcessGroup" in each._type().qualified_name()))


def tensors_of(args: tuple[Any, ...]) -> list[Tensor]:
    """Return both sides of a collective; the larger one is the whole, of a sum both are."""
    return [each for a in args for each in (a if isinstance(a, list) else [a]) if isinstance(each, Tensor)]


def size_of(tensor: Tensor) -> int:
    """Return the bytes of a tensor's numbers."""
    return tensor.numel() * tensor.element_size()
