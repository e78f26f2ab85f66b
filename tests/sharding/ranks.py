"""A rank that trains sharded models over gloo and writes down what it held: `ranks.py RANK WORLD_SIZE STORE CASES`.

CASES is a file with a list of recipes without `auto`; what each rank found is printed as JSON, one line for each.
"""

from __future__ import annotations

import json
import sys
from collections.abc import Iterable, Iterator
from functools import partial
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor
from torch.distributed.device_mesh import init_device_mesh

from bigtrain import amp, batch, recompute
from bigtrain.config.model import resolve_model
from bigtrain.config.schema import Recipe
from bigtrain.memory.measure import measure
from bigtrain.models.build import build_model
from bigtrain.optim.build import build_optimizer
from bigtrain.sharding.apply import hand_over_gradients, local_parameters, shard
from bigtrain.sharding.cost import Layout

STEPS = 3
"""The last one is measured."""


def rows(recipe: Recipe, vocab_size: int) -> dict[str, Tensor]:
    """Return a global batch whose rows are all full and have as many labels each."""
    torch.manual_seed(recipe.seed)
    count, length = recipe.train.global_batch_size, recipe.data.sequence_length
    ids = torch.randint(5, vocab_size, (count, length))
    labels = ids.clone()
    if recipe.train.objective == "mlm":
        hidden = max(1, round(recipe.train.masking_probability * length))
        labels[torch.rand(count, length).argsort(1).argsort(1) >= hidden] = -100
    return {"input_ids": ids, "labels": labels, "document_lengths": torch.tensor([[length]] * count)}


def size_of(tensors: Iterable[Tensor]) -> int:
    storages = {storage._cdata: storage.nbytes() for storage in (tensor.untyped_storage() for tensor in tensors)}
    return sum(storages.values())


SCRATCH: dict[tuple[int, torch.dtype], Tensor] = {}
"""What gloo gets to see: its threads let go of tensors, and of copies of them, at a moment of their own."""


def scratch(like: Tensor) -> Tensor:
    key = like.numel(), like.dtype
    if key not in SCRATCH:
        SCRATCH[key] = torch.empty_like(like)
    return SCRATCH[key]


def gather(output_tensor: Tensor, input_tensor: Tensor, group: Any, async_op: bool = False) -> None:
    """Gather without holding anything for a while."""
    for rank, part in enumerate(output_tensor.chunk(dist.get_world_size(group))):
        sent = scratch(input_tensor).copy_(input_tensor)
        dist.broadcast(sent, group=group, group_src=rank)
        part.copy_(sent)


def reduce(output: Tensor, input: Tensor, group: Any, op: Any, async_op: bool = False) -> None:
    """Reduce and scatter likewise."""
    summed = scratch(input).copy_(input)
    dist.all_reduce(summed, op=op, group=group)
    output.copy_(summed.chunk(dist.get_world_size(group))[dist.get_rank(group)])


COLLECTIVES = {
    "all_gather_single": gather,
    "all_gather_into_tensor": gather,
    "reduce_scatter_single": reduce,
    "reduce_scatter_tensor": reduce,
}
"""What `fully_shard` calls, by the names of all versions of torch that are supported."""


class Rank:
    """What one rank trains."""

    def __init__(self, recipe: Recipe) -> None:
        train, kept = recipe.train, recipe.amp.master_weights
        config = resolve_model(
            recipe.model, vocab_size=recipe.data.vocab_size, sequence_length=recipe.data.sequence_length
        )
        self.recipe, world_size = recipe, dist.get_world_size()
        torch.manual_seed(recipe.seed)
        self.model = build_model(config, dropout=train.dropout, attention_dropout=train.attention_dropout)
        amp.apply(self.model, recipe.amp.precision, master_weights=kept)
        if recipe.recompute.policy != "none":
            recompute.apply(list(self.model.blocks), recipe.recompute.policy)
        matrices = [p.ndim == 2 and name.startswith("blocks.") for name, p in self.model.named_parameters()]
        layout = Layout.of(recipe, world_size, 4 if kept == "fp32" else 2)
        if not layout.alone:
            names = ("replicate", "shard")[2 - len(layout.mesh) :]
            mesh = init_device_mesh("cpu", layout.mesh, mesh_dim_names=names)
            dtype = torch.bfloat16 if layout.converting else None
            self.sharded = shard(self.model, list(self.model.blocks), mesh, zero_stage=layout.zero_stage, dtype=dtype)
        else:
            self.sharded = None
        self.parameters = list(self.model.parameters())
        self.local = local_parameters(self.parameters)
        chosen = [p for p, matrix in zip(self.local, matrices, strict=True) if matrix]
        self.optimizer: Any = build_optimizer(self.local, recipe.optimizer, master_weights=kept, matrices=chosen)
        mine = rows(recipe, config.vocab_size)
        share = train.global_batch_size // world_size
        start = dist.get_rank() * share
        mine = {name: value[start : start + share] for name, value in mine.items()}
        self.micro_batches = [batch.unpad(part) for part in batch.split(mine, train.micro_batch_size)]
        self.gradients = 0

    def step(self) -> float:
        """Take a step; returns the mean loss of this rank's rows."""
        total, count = 0.0, len(self.micro_batches)
        for index, micro in enumerate(self.micro_batches):
            if self.sharded is not None:
                self.sharded.before_micro_batch(last=index == count - 1)
            own = {name: value.clone() if isinstance(value, Tensor) else value for name, value in micro.items()}
            loss = self.model(**own) / count
            loss.backward()
            total += loss.item()
            del loss
        hand_over_gradients(self.parameters, self.local)
        self.gradients = size_of(p.grad for p in self.local if p.grad is not None)
        self.optimizer.step()
        self.optimizer.zero_grad(set_to_none=True)
        return total

    def run(self) -> dict[str, Any]:
        """Take all steps and measure the last one."""
        losses = [self.step() for _ in range(STEPS - 1)]
        weights, state = (
            size_of(self.local),
            size_of(t for kept in self.optimizer.state.values() for t in kept.values()),
        )
        buffers = size_of(self._buffers())
        found = measure(lambda: losses.append(self.step()))
        peak = weights + state + buffers + found.peak_bytes
        return {
            "weights": weights,
            "optimizer_state": state,
            "buffers": buffers,
            "gradients": self.gradients,
            "peak": peak,
            "losses": losses,
        }

    def _buffers(self) -> Iterator[Tensor]:
        for work in self.optimizer._workspaces.values():
            yield from (*work._buffers.values(), *work._tables.values())


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
