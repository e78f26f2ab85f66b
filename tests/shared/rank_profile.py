"""A profile on one of several ranks, and what it sends: `rank_profile.py CASES`, its place in the environment.

CASES is a file with a list of recipes without `auto`. The first rank prints, for each, what every rank found, as a line
of JSON.
"""

from __future__ import annotations

import json
import sys
from itertools import islice
from pathlib import Path
from typing import Any


def found(plan: Any, world: Any) -> dict[str, Any]:
    """Return what this rank held beside what was predicted, and what it sent in a step."""
    from bigtrain.profiling.recipe import profile_recipe

    profile = profile_recipe(plan)
    sides = {"predicted": profile.predicted, "measured": profile.measured}
    return {
        **{name: side.memory.by_cause for name, side in sides.items()},
        "gradients": {name: before_update(side.recording, side.step) for name, side in sides.items()},
        "error": profile.relative_error,
        "blocks": profile.blocks(),
        **sent(plan, world),
    }


def before_update(recording: Any, step: str) -> int:
    """Return the bytes of gradients that are there when a recorded step's update first allocates something, or ends."""
    held = number = 0
    for index, event in enumerate(recording.events[: recording.marks.get("end")]):
        which = number if event >= 0 else ~event
        if event >= 0 and index >= recording.marks[step] and recording.phases[number] == "update":
            return held
        if recording.causes[which] == "gradients":
            held += recording.sizes[which] if event >= 0 else -recording.sizes[which]
        number += event >= 0
    return held


def sent(plan: Any, world: Any) -> dict[str, dict[str, int]]:
    """Return the collectives of parameters and gradients in a second step and their bytes, by kind and ranks."""
    from counted import Sent

    from bigtrain.data.ensure import ensure_prepared
    from bigtrain.training.build import build_engine, build_loader

    engine, loader = build_engine(plan), build_loader(plan, ensure_prepared(plan.recipe), world)
    counts = []
    for batch in islice(loader, 2):
        with Sent() as counted:
            for micro in engine.micro_batches(batch):
                engine.backward(engine.model(**micro))
            engine.step(plan.recipe.train.max_grad_norm)
        counts.append({"calls": dict(counted.calls), "bytes": dict(counted.bytes)})
    loader.close()
    return counts[1]


def main(cases: str) -> None:
    """Profile each recipe of a file."""
    import torch
    from beside_blocks import record_beside_blocks

    import bigtrain
    from bigtrain.config.schema import Recipe
    from bigtrain.planner import hardware
    from bigtrain.profiling import steps
    from bigtrain.world import joined

    torch.set_num_threads(1)
    steps.record = record_beside_blocks  # the room of low-precision products, which no price names
    with joined(kind="cpu", timeout_seconds=120) as world:
        for case in json.loads(Path(cases).read_text()):
            plan = bigtrain.plan(Recipe.model_validate(case), hardware.cpu())
            told = world.gather(json.dumps(found(plan, world)))
            if world.first:
                print(json.dumps({"ranks": [json.loads(text) for text in told]}), flush=True)


if __name__ == "__main__":
    main(sys.argv[1])
