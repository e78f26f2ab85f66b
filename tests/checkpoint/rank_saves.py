"""A rank that trains a model cut by `fully_shard`, saves it and reads it: `rank_saves.py RANK STORE FOLDER`.

There are four ranks. The last one kills itself in the middle of the last save; the others print how they notice.
"""

from __future__ import annotations

import json
import os
import signal
import sys
from datetime import timedelta
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist
from ranks_apart import Position
from torch import Tensor, nn
from torch.distributed.device_mesh import init_device_mesh

from bigtrain.amp.loss_scale import LossScale
from bigtrain.checkpoint import tensors
from bigtrain.checkpoint.state import TrainState, optimizer_state, weights
from bigtrain.checkpoint.store import CheckpointStore
from bigtrain.engine import Engine
from bigtrain.optim import AdamW
from bigtrain.sharding.apply import shard
from bigtrain.world import current_world

MESHES = [(4,), (2, 2), (4, 1), (4,)]
ROWS = 8


class Model(nn.Module):
    """Tied weights, a buffer, a vector of fewer rows than ranks, and a matrix of 8-bit states."""

    def __init__(self) -> None:
        super().__init__()
        self.embedding = nn.Embedding(200, 256)
        self.blocks = nn.ModuleList(nn.Linear(256, 256) for _ in range(2))
        self.narrow = nn.Linear(256, 3)
        self.head = nn.Linear(256, 200, bias=False)
        self.head.weight = self.embedding.weight
        self.register_buffer("scale", torch.rand(3))

    def forward(self, ids: Tensor) -> Tensor:
        hidden = self.embedding(ids)
        for block in self.blocks:
            hidden = hidden + block(hidden).relu()
        return self.head(hidden).square().mean() + (self.narrow(hidden) * self.scale).sum(-1).square().mean()


def state_on(mesh_shape: tuple[int, ...], seed: int) -> TrainState:
    torch.manual_seed(seed)
    model = Model()
    stage = 0 if mesh_shape[-1] == 1 else 3
    mesh = init_device_mesh("cpu", mesh_shape, mesh_dim_names=("replicate", "shard")[2 - len(mesh_shape) :])
    sharded = shard(model, list(model.blocks), mesh, zero_stage=stage)
    optimizer = AdamW(sharded.parameters.values(), lr=1e-2, state="8bit")
    for group in optimizer.param_groups:
        group["initial_lr"] = group["lr"]
    engine = Engine(
        model,
        optimizer,
        micro_batch_size=ROWS,
        shifted_labels=False,
        schedule=lambda _: 1.0,
        loss_scale=LossScale("cpu", precision="fp32"),
        sharded=sharded,
        world=current_world(),
    )
    return TrainState(engine, Position())  # type: ignore[arg-type]


def take(state: TrainState, steps: range) -> None:
    for step in steps:
        ids = torch.arange(ROWS) + step + dist.get_rank()
        for micro in state.engine.micro_batches({"ids": ids}):
            state.engine.backward(state.engine.model(**micro))
        state.engine.step()


def bits(state: TrainState) -> list[Tensor]:
    engine = state.engine
    return [*(p.detach() for p in engine.parameters.values()), *optimizer_state(engine)[0].values()]


def save(state: TrainState, folder: Path) -> Path:
    return state.save(CheckpointStore(folder, world=state.engine.world), {"plan.yaml": "a plan"})


def through_meshes(folder: Path) -> None:
    """Save from each mesh what was read from the one before, and go on where the first left off."""
    for index, mesh in enumerate(MESHES):
        state = state_on(mesh, seed=index)
        if index == 0:
            take(state, range(2))
            first = state
        else:
            state.restore(folder / str(index - 1) / "step-00000002")
        save(state, folder / str(index))
    same = all(torch.equal(one, other) for one, other in zip(bits(first), bits(state), strict=True))
    take(first, range(2, 4))
    take(state, range(2, 4))
    later = all(torch.equal(one, other) for one, other in zip(bits(first), bits(state), strict=True))
    tied = [name for name, _ in weights(first.engine.model)]
    print(json.dumps({"same": same, "later": later, "names": tied}), flush=True)


def killed(folder: Path) -> None:
    """Die in the middle of a save, or notice that another rank has."""
    state = state_on(MESHES[0], seed=0)
    take(state, range(1))
    save(state, folder)
    take(state, range(1, 2))
    if dist.get_rank() == 3:
        file: Any = tensors.DigestingFile
        file.close = lambda _: os.kill(os.getpid(), signal.SIGKILL)
    try:
        save(state, folder)
    except (RuntimeError, OSError) as error:
        print(json.dumps({"noticed": str(error)}), flush=True)


def main(rank: int, place: str, folder: Path) -> None:
    torch.set_num_threads(1)
    patience = timedelta(seconds=60)
    dist.init_process_group("gloo", init_method=f"file://{place}", rank=rank, world_size=4, timeout=patience)
    through_meshes(folder)
    killed(folder / "killed")
    os._exit(0)  # the group has lost a rank, and would wait for it


if __name__ == "__main__":
    main(int(sys.argv[1]), sys.argv[2], Path(sys.argv[3]))
