"""The first of many ranks, the others made up: `fake_ranks.py WORLD_SIZE CASES`.

torch's fake process group answers at once, with whatever is there, so that one process sees what it would hold and
send among so many. CASES is a file with a list of recipes without `auto`; what was found is printed as JSON, one line
for each.
"""

from __future__ import annotations

import json
import sys
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist
from counted import Sent
from ranks import Rank, size_of
from torch.testing._internal.distributed.fake_pg import FakeStore

from bigtrain.config.schema import Recipe


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
