"""The state of a run of a few numbers, as it is after any step: saved and restored in milliseconds."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import torch
from ranks_apart import cut_engine, step
from torch import Tensor, nn

from bigtrain.checkpoint.lineage import Identity
from bigtrain.checkpoint.saver import Saver
from bigtrain.checkpoint.state import TrainState, optimizer_state
from bigtrain.checkpoint.store import CheckpointStore
from bigtrain.optim import AdamW
from bigtrain.world import ALONE, World

TEXTS = {"plan.yaml": "name: tiny\n", "tokenizer.json": "{}"}

RUN = Identity("a recipe", "some data", frozenset(["a recipe"]))


class Place:
    """A loader that only knows its row."""

    def __init__(self, row: int) -> None:
        self.row = row

    def state_dict(self) -> dict[str, Any]:
        return {"row": self.row, "corpus": "some data"}

    def load_state_dict(self, state: dict[str, Any], *, other_data: bool = False) -> None:
        self.row = state["row"]


def state_after(steps: int, world: World = ALONE) -> TrainState:
    """Return the state after so many steps; another seed of weights for none."""
    with torch.random.fork_rng():
        torch.manual_seed(7 if steps else 8)
        model = nn.Linear(5, 3)
    engine = cut_engine(model, lambda held: AdamW(held, lr=0.1), world)
    for number in range(1, steps + 1):
        step(engine, number)
    return TrainState(engine, Place(steps), tokens=10 * steps)  # type: ignore[arg-type]


def bits(state: TrainState) -> list[Tensor]:
    return [*(p.detach() for p in state.engine.parameters.values()), *optimizer_state(state.engine)[0].values()]


def store_in(folder: Path, *, keep: int = 3, world: World = ALONE) -> CheckpointStore:
    return CheckpointStore(folder, keep=keep, world=world, identity=RUN)


def saver_in(folder: Path, *, keep: int = 3, copies: bool = False) -> Saver:
    return Saver(store_in(folder, keep=keep), ALONE, copies=copies)


def save(folder: Path, steps: int, *, keep: int = 3) -> Path:
    return state_after(steps).save(store_in(folder, keep=keep), TEXTS)


def holds(folder: Path, expected: TrainState) -> bool:
    """Tell whether a checkpoint restores a state to the bit."""
    found = state_after(0)
    found.restore(folder)
    return (found.step, found.tokens, found.loader.state_dict()) == (
        expected.step,
        expected.tokens,
        expected.loader.state_dict(),
    ) and all(torch.equal(one, other) for one, other in zip(bits(found), bits(expected), strict=True))
