"""The first of many ranks, the others made up: `fake_ranks.py WORLD_SIZE CASES`.

torch's fake process group answers at once, with whatever is there, so that one process sees what it would hold and
send among so many. CASES is a file with a list of recipes without `auto`; what was found is printed as JSON, one line
for each.
"""

from __future__ import annotations

import json
import sys
from collections import Counter
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist
from ranks import Rank, size_of
from torch import Tensor
from torch.testing._internal.distributed.fake_pg import FakeStore
from torch.utils._python_dispatch import TorchDispatchMode

from bigtrain.config.schema import Recipe

KINDS = {"_allgather_base_": "all_gather", "_reduce_scatter_base_": "reduce_scatter", "allreduce_": "all_reduce"}
"""Of torch's own operators, which all versions share."""


class Sent(TorchDispatchMode):
    """Counts collectives of tensors by kind and number of ranks, and the bytes that a ring makes a rank send."""

    def __init__(self) -> None:
        super().__init__()
        self.calls: Counter[str] = Counter()
        self.bytes: Counter[str] = Counter()

    def __torch_dispatch__(
        self, func: Any, types: Any, args: tuple[Any, ...] = (), kwargs: Mapping[str, Any] | None = None
    ) -> Any:
        kind = KINDS.get(func._schema.name.removeprefix("c10d::"))
        if kind is not None:
            ranks, size = group_of(args).size(), whole_bytes(args)
            self.calls[f"{kind} {ranks}"] += 1
            self.bytes[f"{kind} {ranks}"] += (2 if kind == "all_reduce" else 1) * size * (ranks - 1) // ranks
        return func(*args, **(kwargs or {}))


def group_of(args: tuple[Any, ...]) -> dist.ProcessGroup:
    scripted = [each for each in args if isinstance(each, torch.ScriptObject)]
    return dist.ProcessGroup.unbox(next(each for each in scripted if "ProcessGroup" in each._type().qualified_name()))


def whole_bytes(args: tuple[Any, ...]) -> int:
    """Return the bytes of the larger side: both are the same for a sum."""
    tensors = [each for a in args for each in (a if isinstance(a, list) else [a]) if isinstance(each, Tensor)]
    return max(tensor.numel() * tensor.element_size() for tensor in tensors)


def found(recipe: Recipe) -> dict[str, Any]:
    """Return what the first rank holds after a step, and sends in the next."""
    rank = Rank(recipe)
    rank.step()
    with Sent() as sent:
        rank.step()
    kept = [tensor for state in rank.optimizer.state.values() for tensor in state.values()]
    return {
        "weights": size_of(rank.local),
        "gradients": rank.gradients,
        "optimizer_state": size_of(kept),
        "calls": sent.calls,
        "bytes": sent.bytes,
    }


def main(world_size: int, cases: str) -> None:
    torch.set_num_threads(1)
    dist.init_process_group("fake", store=FakeStore(), rank=0, world_size=world_size)
    for case in json.loads(Path(cases).read_text()):
        print(json.dumps(found(Recipe.model_validate(case))), flush=True)
    dist.destroy_process_group()


if __name__ == "__main__":
    main(int(sys.argv[1]), sys.argv[2])
