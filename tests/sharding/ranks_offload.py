"""A rank that trains with offload over gloo and writes down what it held: arguments RANK WORLD_SIZE STORE CASES.

CASES is a file with a list of recipes without `auto`; what each rank found is printed as JSON, one line for each.
"""

from __future__ import annotations

import json
import sys
from functools import partial
from pathlib import Path
from typing import Any

import ranks
import torch
import torch.distributed as dist
from ranks import COLLECTIVES, STEPS, size_of
from torch.distributed.device_mesh import init_device_mesh

from bigtrain import amp, batch, recompute
from bigtrain.config.model import resolve_model
from bigtrain.config.schema import Recipe
from bigtrain.memory.layout import layout_of
from bigtrain.memory.measure import measure
from bigtrain.models.build import build_model
from bigtrain.optim.build import build_optimizer
from bigtrain.optim.offload import keep_on_host
from bigtrain.sharding.apply import Sharded, shard
from bigtrain.sharding.cost import Layout
from bigtrain.sharding.offload import narrow

CPU = torch.device("cpu")
LOW = torch.bfloat16


class Rank:
    """What one rank trains."""

    def __init__(self, recipe: Recipe) -> None:
        self.recipe, train = recipe, recipe.train
        size = {"vocab_size": recipe.data.vocab_size, "sequence_length": recipe.data.sequence_length}
        config = resolve_model(recipe.model, **size)
        torch.manual_seed(recipe.seed)
        self.model = build_model(config, dropout=0.0, attention_dropout=0.0)
        layout = layout_of(recipe, dist.get_world_size())
        accumulated = layout.accumulated
        amp.apply(self.model, recipe.amp.precision, master_weights=recipe.amp.master_weights, accumulated=accumulated)
        if recipe.recompute.policy != "none":
            recompute.apply(list(self.model.blocks), recipe.recompute.policy)
        self.sharded = None if layout.alone else self._shard(layout)
        named = dict(self.model.named_parameters()) if self.sharded is None else self.sharded.parameters
        self.local = list(named.values())
        matrices = [p for name, p in named.items() if p.ndim == 2 and name.startswith("blocks.")]
        kept: dict[str, Any] = {"master_weights": recipe.amp.master_weights, "matrices": matrices}
        self.optimizer: Any = build_optimizer(self.local, recipe.optimizer, **kept)
        if layout.offload != "none":
            self._offload(layout, accumulated=accumulated)
        share = train.global_batch_size // dist.get_world_size()
        start = dist.get_rank() * share
        mine = {name: rows[start : start + share] for name, rows in ranks.rows(recipe, config.vocab_size).items()}
        micro = recipe.train.micro_batch_size
        assert micro != "auto"
        self.micro_batches = [batch.unpad(part) for part in batch.split(mine, micro)]

    def _shard(self, layout: Layout) -> Sharded:
        mesh = init_device_mesh("cpu", layout.mesh, mesh_dim_names=("replicate", "shard")[2 - len(layout.mesh) :])
        dtype = LOW if layout.converting else None
        blocks, stage = list(self.model.blocks), layout.zero_stage
        return shard(self.model, blocks, mesh, zero_stage=stage, dtype=dtype, offload=layout.offload)

    def _offload(self, layout: Layout, *, accumulated: bool) -> None:
        low = LOW if layout.kept_bytes == 2 and self.recipe.amp.master_weights == "fp32" else None
        wide = torch.float32 if accumulated and self.sharded is None else None
        everything = layout.offload == "all"
        keep_on_host(self.optimizer, CPU, everything=everything, dtype=low, gradient_dtype=wide)
        if low is not None and self.sharded is not None:
            narrow(self.model, self.local, low)

    def step(self) -> float:
        """Take a step; returns the mean loss of this rank's rows."""
        total, count = 0.0, len(self.micro_batches)
        for index, micro in enumerate(self.micro_batches):
            if self.sharded is not None:
                self.sharded.before_micro_batch(last=index == count - 1)
            loss = self.model(**dict(micro)) / count
            loss.backward()
            total += loss.item()
            del loss
        if self.sharded is not None:
            self.sharded.hand_over()
        self.gradients = size_of(p.grad for p in self.local if p.grad is not None)
        self.optimizer.step()
        self.optimizer.zero_grad(set_to_none=True)
        return total

    def run(self) -> dict[str, Any]:
        """Take all steps and measure the last one."""
        losses = [self.step() for _ in range(STEPS - 1)]
        weights = size_of(self.local)
        state = size_of(t for kept in self.optimizer.state.values() for t in kept.values())
        works = self.optimizer._workspaces.values()
        buffers = size_of(t for work in works for t in (*work._buffers.values(), *work._tables.values()))
        found = measure(lambda: losses.append(self.step()))
        sizes = {"weights": weights, "state": state, "buffers": buffers, "gradients": self.gradients}
        return {**sizes, "peak": weights + state + buffers + found.peak_bytes, "losses": losses}


def main(rank: int, world_size: int, store: str, cases: str) -> None:
    torch.set_num_threads(1)
    for name in filter(partial(hasattr, dist), COLLECTIVES):
        setattr(dist, name, COLLECTIVES[name])
    dist.init_process_group("gloo", init_method=f"file://{store}", rank=rank, world_size=world_size)
    for case in json.loads(Path(cases).read_text()):
        print(json.dumps(Rank(Recipe.model_validate(case)).run()), flush=True)
    dist.destroy_process_group()


if __name__ == "__main__":
    main(int(sys.argv[1]), int(sys.argv[2]), sys.argv[3], sys.argv[4])
