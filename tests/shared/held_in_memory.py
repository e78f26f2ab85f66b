"""What a save and a load add to the resident memory of training: `held_in_memory.py RECIPE FOLDER [KEY=VALUE]...`.

Prints one JSON object of bytes: what the state has (`state`), its largest tensor (`largest`), and the peaks of a save
above what training has, and of a load above what the loaded state has.
"""

from __future__ import annotations

import gc
import json
import sys
from collections.abc import Callable
from functools import partial
from pathlib import Path

import torch

import bigtrain
from bigtrain.checkpoint.optimizer import optimizer_state
from bigtrain.checkpoint.state import TrainState, weights
from bigtrain.checkpoint.store import CheckpointStore
from bigtrain.data.ensure import ensure_prepared
from bigtrain.planner import hardware
from bigtrain.training.build import build_engine, build_loader


def resident(name: str) -> int:
    """Return VmRSS or VmHWM, in bytes."""
    lines = Path("/proc/self/status").read_text().splitlines()
    return 1024 * next(int(line.split()[1]) for line in lines if line.startswith(name))


def peak_of(work: Callable[[], object]) -> int:
    """Return the highest resident memory while something is done."""
    gc.collect()
    Path("/proc/self/clear_refs").write_text("5")  # the peak begins anew: proc(5)
    work()
    return resident("VmHWM")


def state_of(plan: bigtrain.Plan) -> TrainState:
    return TrainState(build_engine(plan), build_loader(plan, ensure_prepared(plan.recipe)))


def take_step(state: TrainState) -> None:
    batch = next(iter(state.loader))
    for micro in state.engine.micro_batches(batch):
        state.engine.backward(state.engine.model(**micro))
    state.engine.step()
    state.loader.close()


def main(recipe: str, folder: str, *overrides: str) -> None:
    torch.set_num_threads(1)
    plan = bigtrain.plan(bigtrain.load_recipe(recipe, overrides), hardware.cpu())
    store, trained = CheckpointStore(Path(folder)), state_of(plan)
    take_step(trained)
    held = [*dict(weights(trained.engine.model)).values(), *optimizer_state(trained.engine)[0].values()]
    sizes = [tensor.numel() * tensor.element_size() for tensor in held]
    before = resident("VmRSS")
    save = peak_of(partial(trained.save, store, {})) - before
    del held, trained
    gc.collect()
    found = store.newest()
    assert found is not None
    loaded = state_of(plan)
    peak = peak_of(partial(loaded.restore, found))
    print(json.dumps({"state": sum(sizes), "largest": max(sizes), "save": save, "load": peak - resident("VmRSS")}))


if __name__ == "__main__":
    main(*sys.argv[1:])
