"""One of several ranks that DeepSpeed trains for and `fully_shard` too, each from the other's checkpoints.

`rank_deepspeed.py CASES`, its place in the environment. CASES is a file with a folder and a list of recipes for
DeepSpeed; the first rank prints what it found for each, as a line of JSON.
"""

from __future__ import annotations

import json
import sys
from pathlib import Path
from typing import Any

from rank_run import ROWS, rows

FIRST, SECOND, THIRD = 4, 3, 2
"""Steps before the first checkpoint, between both, and after."""


class Run:
    """A run under one of the two engines."""

    def __init__(self, recipe: Any, name: str) -> None:
        import torch
        from ranks_apart import Position

        import bigtrain
        from bigtrain import deepspeed_engine, engine
        from bigtrain.checkpoint.state import TrainState
        from bigtrain.optim.build import build_optimizer
        from bigtrain.planner import hardware
        from bigtrain.training.build import build_plan_model

        section = recipe.sharding.model_copy(update={"engine": name})
        plan = bigtrain.plan(recipe.model_copy(update={"sharding": section}), hardware.cpu())
        with torch.device("meta"):
            model = build_plan_model(plan)
        prepare = deepspeed_engine.prepare if name == "deepspeed" else engine.prepare
        self.recipe = recipe
        self.engine: Any = prepare(model, plan, lambda held: build_optimizer(held, plan.recipe.optimizer))
        position: Any = Position()
        self.state = TrainState(self.engine, position)

    def steps(self, count: int) -> list[tuple[float, float]]:
        """Take steps; return losses and norms."""
        engine, found = self.engine, []
        rank, share = engine.world.rank, ROWS // engine.world.size
        for _ in range(count):
            whole = rows(self.recipe.model.family, engine.steps_taken)
            mine = {name: tensor[rank * share : (rank + 1) * share] for name, tensor in whole.items()}
            for micro in engine.micro_batches(mine):
                engine.backward(engine.model(**micro))
            result = engine.step(self.recipe.train.max_grad_norm)
            assert not result.skipped
            found.append((float(result.loss), float(result.grad_norm)))
        return found

    def save(self, folder: Path) -> Path:
        from bigtrain.checkpoint.store import CheckpointStore

        return self.state.save(CheckpointStore(folder, keep=2, world=self.engine.world), {})

    def restore(self, folder: Path) -> None:
        self.state.restore(folder)


def cross(recipe: Any, folder: Path) -> dict[str, Any]:
    """Train under `fully_shard`, go on from its checkpoint under DeepSpeed, and from that one's again without."""
    plain, deep, back = Run(recipe, "fsdp2"), Run(recipe, "deepspeed"), Run(recipe, "fsdp2")
    plain.steps(FIRST)
    deep.restore(plain.save(folder / "plain"))
    middle = {"plain": plain.steps(SECOND), "deep": deep.steps(SECOND)}
    saved = deep.save(folder / "deep")
    back.restore(saved)
    again = Run(recipe, "deepspeed")
    again.restore(saved)
    runs = {"plain": plain, "deep": deep, "back": back, "again": again}
    return {
        "middle": middle,
        "end": {name: run.steps(THIRD) for name, run in runs.items()},
        "files": sorted(path.name for path in saved.iterdir()),
        "fresh": Run(recipe, "deepspeed").steps(SECOND),
    }


def main(cases: str) -> None:
    """Cross with each recipe of a file."""
    import torch

    from bigtrain.config.schema import Recipe
    from bigtrain.world import joined

    torch.set_num_threads(1)
    folder, recipes = json.loads(Path(cases).read_text())
    with joined(kind="cpu", timeout_seconds=120) as world:
        for index, recipe in enumerate(recipes):
            found = cross(Recipe.model_validate(recipe), Path(folder) / str(index))
            if world.first:
                print(json.dumps(found), flush=True)


if __name__ == "__main__":
    main(sys.argv[1])
