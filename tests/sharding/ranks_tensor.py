"""A rank that trains models whose products are shared: `ranks_tensor.py CASES`, its place in the environment.

CASES is a file with a list of cases: a recipe without `auto`, and where to restore from before and save to after its
steps. What each rank found is printed as JSON, one line for each case.
"""

from __future__ import annotations

import hashlib
import json
import sys
from collections.abc import Iterator
from functools import partial
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist
from ranks import COLLECTIVES, rows, scratch, size_of
from ranks_apart import Position
from torch import Tensor

from bigtrain.checkpoint.state import TrainState, own_states, own_weights
from bigtrain.checkpoint.store import CheckpointStore
from bigtrain.config.schema import Recipe
from bigtrain.memory.measure import measure
from bigtrain.planner import hardware
from bigtrain.planner.plan import plan
from bigtrain.sharding import tensor
from bigtrain.training.build import build_engine
from bigtrain.training.runtime import seed_step
from bigtrain.world import current_world, joined

STEPS = 10
"""The last one is measured."""


class Sums:
    """Counts sums over ranks that share products, and the bytes of what each makes."""

    def __init__(self) -> None:
        self.calls = self.bytes = 0
        self._plain = tensor.sum_over_ranks
        tensor.sum_over_ranks = self._counted  # type: ignore[assignment]

    def _counted(self, partial_sum: Tensor, bias: Tensor | None, group: str) -> Any:
        self.calls, self.bytes = self.calls + 1, self.bytes + partial_sum.nbytes
        return self._plain(partial_sum, bias, group)


PLAIN_ALL_REDUCE = dist.all_reduce


def all_reduce(tensor: Tensor, *args: Any, **kwargs: Any) -> None:
    """Reduce what gloo's threads may hold for a while."""
    reduced = scratch(tensor).copy_(tensor)
    PLAIN_ALL_REDUCE(reduced, *args, **kwargs)
    tensor.copy_(reduced)


class Rank:
    """What one rank trains."""

    def __init__(self, recipe: Recipe, *, uneven: bool) -> None:
        world = current_world()
        made = plan(recipe, hardware.cpu(), world_size=world.size)
        self.recipe, self.engine = made.recipe, build_engine(made)
        self.reader, readers = world.reading(recipe.sharding.tensor_parallel)
        whole = rows(recipe, made.model.vocab_size)
        if uneven:
            whole["labels"][1::3, : recipe.data.sequence_length // 2] = -100
        share = recipe.train.global_batch_size // readers
        start = self.reader * share
        self.batch = {name: value[start : start + share] for name, value in whole.items()}
        self.state = TrainState(self.engine, Position())  # type: ignore[arg-type]
        self.gradients = 0

    def step(self) -> tuple[float, float]:
        """Take a step; returns the loss and the gradient's norm."""
        engine = self.engine
        seed_step(self.recipe.seed, engine.steps_taken, self.reader)
        for micro in engine.micro_batches(self.batch):
            engine.backward(engine.model(**micro))
        if not self.gradients:
            kept = engine.parameters if engine.sharded is None else engine.sharded.whole
            self.gradients = size_of(_local(p.grad) for p in kept.values() if p.grad is not None)
        result = engine.step(self.recipe.train.max_grad_norm)
        return float(result.loss), float(result.grad_norm)

    def run(self) -> dict[str, Any]:
        """Take all steps, and measure the last one."""
        found = [self.step() for _ in range(STEPS - 1)]
        optimizer: Any = self.engine.optimizer
        weights = size_of(self.engine.parameters.values())
        state = size_of(t for kept in optimizer.state.values() for t in kept.values())
        buffers = size_of(_buffers(optimizer))
        sums = Sums()
        peak = weights + state + buffers + measure(lambda: found.append(self.step())).peak_bytes
        tensor.sum_over_ranks = sums._plain
        return {
            "steps": found,
            "weights": weights,
            "optimizer_state": state,
            "buffers": buffers,
            "gradients": self.gradients,
            "peak": peak,
            "sums": [sums.calls, sums.bytes],
        }

    def digest(self) -> str:
        """Return what tells states of weights and optimizer apart."""
        digest = hashlib.sha256()
        for tensors, _ in (own_weights(self.engine), own_states(self.engine)):
            for name, value in tensors.items():
                digest.update(name.encode() + value.detach().contiguous().view(-1).view(torch.uint8).numpy().tobytes())
        return digest.hexdigest()


def _local(gradient: Tensor) -> Tensor:
    return gradient.to_local() if hasattr(gradient, "to_local") else gradient


def _buffers(optimizer: Any) -> Iterator[Tensor]:
    for work in optimizer._workspaces.values():
        yield from (*work._buffers.values(), *work._tables.values())


def follow(case: dict[str, Any]) -> dict[str, Any]:
    rank = Rank(Recipe.model_validate(case["recipe"]), uneven=case.get("uneven", False))
    found: dict[str, Any] = {}
    if case.get("restore"):
        rank.state.restore(Path(case["restore"]))
    else:
        found = rank.run()
    found["digest"] = rank.digest()
    if case.get("save"):
        store = CheckpointStore(Path(case["save"]), world=rank.engine.world)
        found["saved"] = str(rank.state.save(store, {}))
        found["next"] = [rank.step(), rank.step()]
    return found


def main(cases: str) -> None:
    torch.set_num_threads(1)
    for name in filter(partial(hasattr, dist), COLLECTIVES):
        setattr(dist, name, COLLECTIVES[name])
    dist.all_reduce = all_reduce  # type: ignore[assignment]
    with joined(kind="cpu", timeout_seconds=120):
        for case in json.loads(Path(cases).read_text()):
            print(json.dumps(follow(case)), flush=True)


if __name__ == "__main__":
    main(sys.argv[1])
