"""A model on several ranks in which single bits are flipped, and what the others notice: `rank_replicas.py CASES`.

CASES is a file with a list of recipes, each with how many bits to flip and steps of a check interval. Each rank prints,
for each recipe, what is said of its replicas; for each flip where it was, and the error, or null; and how often clean
checks gave an alarm.
"""

from __future__ import annotations

import hashlib
import json
import random
import sys
import time
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import torch
from rank_run import ROWS, rows

CLEAN_CHECKS = 40


class Trained:
    """A recipe's engine, its replicas, and steps on made-up rows."""

    def __init__(self, recipe: Any) -> None:
        import bigtrain
        from bigtrain.planner import hardware
        from bigtrain.training.build import build_engine
        from bigtrain.training.replicas import Replicas

        self.plan = bigtrain.plan(recipe, hardware.cpu())
        self.engine = build_engine(self.plan)
        self.replicas = Replicas(self.plan, self.engine, lambda: "no checkpoint")
        self.step_seconds: list[float] = []
        self.parts = self.engine.world.gather(str(self.engine.shard_rank))
        """Which part of the parameters each rank has."""

    def step(self) -> None:
        """Take a step as `Run` does."""
        begin, engine, recipe = time.perf_counter(), self.engine, self.plan.recipe
        rank, share = engine.world.rank, ROWS // engine.world.size
        whole = rows(recipe.model.family, engine.steps_taken)
        for micro in engine.micro_batches({k: v[rank * share : (rank + 1) * share] for k, v in whole.items()}):
            engine.backward(engine.model(**micro))
        self.replicas.before_update()
        engine.step(recipe.train.max_grad_norm)
        if engine.world.any(self.replicas.flipped):
            self.replicas.tell_flipped()
        self.step_seconds.append(time.perf_counter() - begin)

    @contextmanager
    def put_back(self) -> Iterator[None]:
        """Undo whatever happens to the state inside."""
        from bigtrain.training.replicas import groups_of

        taken = self.engine.steps_taken
        held = [tensor for group in groups_of(self.engine) for tensor in group.tensors.values()]
        kept = [tensor.clone() for tensor in held]
        yield
        for tensor, before in zip(held, kept, strict=True):
            tensor.copy_(before)
        self.engine.steps_taken, self.replicas.flipped = taken, False


def flips(trained: Trained, count: int, every: int) -> Iterator[dict[str, Any]]:
    """Flip bits one after another, on some rank before some of the `every` steps to the next check; yield what is said.

    The state is put back each time. A bit that rounding has undone by then, on all ranks to the last bit, is told as
    `undone` and does not count.
    """
    from bigtrain.errors import BigtrainError
    from bigtrain.training.injected import flip_bit
    from bigtrain.training.replicas import groups_of

    draw, world = random.Random(5), trained.engine.world
    counted = 0
    while counted < count:
        rank, when, which, where = draw.randrange(world.size), draw.randrange(every), draw.random(), draw.random()
        error = None
        with trained.put_back():
            trained.replicas._checked_at = None
            trained.replicas.check()
            held = groups_of(trained.engine)[0].tensors
            name = sorted(held)[int(which * len(held))]
            try:
                for step in range(every):
                    if step == when and rank == world.rank:
                        flip_bit([held[name]], int(where * 8 * held[name].nbytes))
                    trained.step()
                trained.replicas.check()
            except BigtrainError as found:
                error = str(found)
            undone = error is None and len(set(world.gather(digest(trained)))) == len(set(trained.parts))
        counted += not undone
        parameter = next(known for known in trained.engine.parameters if f"{name}.".startswith(f"{known}."))
        yield {"rank": rank, "parameter": parameter, "when": when, "error": error, "undone": undone}


def digest(trained: Trained) -> str:
    """Return the SHA-256 of all that this rank holds, by nothing of what is tested."""
    from bigtrain.training.replicas import groups_of

    found = hashlib.sha256()
    for group in groups_of(trained.engine):
        for tensor in group.tensors.values():
            found.update(tensor.contiguous().view(-1).view(torch.uint8).numpy().tobytes())
    return found.hexdigest()


def clean(trained: Trained) -> dict[str, Any]:
    """Take steps with a check after each; return how many gave an alarm, and what both take, medians in seconds."""
    from statistics import median

    from bigtrain.errors import BigtrainError

    trained.step_seconds.clear()
    alarms, seconds = 0, []
    for _ in range(CLEAN_CHECKS):
        trained.step()
        begin = time.perf_counter()
        try:
            trained.replicas.check()
        except BigtrainError:
            alarms += 1
        seconds.append(time.perf_counter() - begin)
    return {"alarms": alarms, "checks": CLEAN_CHECKS, "step": median(trained.step_seconds), "check": median(seconds)}


def main(cases: str) -> None:
    """Go through a file of cases."""
    from bigtrain.config.schema import Recipe
    from bigtrain.world import joined

    torch.set_num_threads(1)
    with joined(kind="cpu", timeout_seconds=300):
        for recipe, count, every in json.loads(Path(cases).read_text()):
            trained = Trained(Recipe.model_validate(recipe))
            for _ in range(2):
                trained.step()
            found = [*flips(trained, count, every)] if trained.replicas._most > 1 else []
            said = trained.replicas.lines()
            print(json.dumps({"said": said, "flips": found, "clean": clean(trained)}), flush=True)


if __name__ == "__main__":
    main(sys.argv[1])
