"""A run on one of several ranks, as the shipped loop takes steps: `rank_run.py CASES`, its place in the environment.

CASES is a file with a list of recipes. The first rank prints, for each, what all of them found, as a line of JSON.
"""

from __future__ import annotations

import json
import sys
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from group import SECONDS, told_by_all

ROWS, LENGTH, VOCABULARY = 16, 16, 90


def rows(family: str, step: int, *, pairs: bool = False) -> dict[str, Any]:
    """Return a global batch whose rows have from no label to many, and of documents or pairs one, two and padding."""
    import torch

    generator = torch.Generator().manual_seed(step)
    ids = 5 + (torch.rand(ROWS, LENGTH, generator=generator).pow(3) * (VOCABULARY - 5)).long()
    lengths = torch.tensor([[LENGTH - 1, 0], [9, 6]] * (ROWS // 2))
    labels = torch.full_like(ids, -100)
    for row in range(4, ROWS):  # the first rank's first rows have none
        first = int(lengths[row, 0])
        if family == "bert":
            labels[row, : 1 + row % 7] = ids[row, : 1 + row % 7]
        else:
            labels[row, row % 4 : first - 1] = ids[row, 1 + row % 4 : first]
    found = {"input_ids": ids, "labels": labels, "document_lengths": lengths.to(torch.int32)}
    if pairs:
        found["segment_ids"] = (torch.arange(LENGTH) % 5 > 2).long().repeat(ROWS, 1)
        found["next_sentence_labels"] = (ids[:, :2] % 2).masked_fill(lengths == 0, -100)
    return found


def follow(recipe: Any, steps: int) -> dict[str, Any]:
    """Take so many steps of a recipe without `auto` on the ranks that are here; return what they tell."""
    import bigtrain
    from bigtrain.planner import hardware
    from bigtrain.training.build import build_engine
    from bigtrain.training.runtime import seed_step

    plan = bigtrain.plan(recipe, hardware.cpu())
    engine = build_engine(plan)
    rank, share = engine.world.rank, ROWS // engine.world.size
    losses, norms, skipped = [], [], []
    for step in range(steps):
        seed_step(recipe.seed, step, rank)
        whole = rows(recipe.model.family, step, pairs=plan.model.next_sentence)
        mine = {name: tensor[rank * share : (rank + 1) * share] for name, tensor in whole.items()}
        for micro in engine.micro_batches(mine):
            engine.backward(engine.model(**micro))
        result = engine.step(recipe.train.max_grad_norm)
        losses.append(float(result.loss))
        norms.append(float(result.grad_norm))
        skipped.append(result.skipped)
    held = {name: list(parameter.shape) for name, parameter in engine.parameters.items()}
    told = [json.loads(text) for text in engine.world.gather(json.dumps([losses, norms, skipped]))]
    assert all(one == told[0] for one in told), "ranks tell different losses"
    return {"losses": losses, "norms": norms, "skipped": any(skipped), "held": held}


def on_ranks(recipes: Sequence[Any], world_size: int, folder: Path, *, steps: int) -> list[dict[str, Any]]:
    """Follow recipes on so many new processes; return what the first rank found of each."""
    cases = folder / f"cases-{world_size}.json"
    cases.write_text(json.dumps([steps, [recipe.model_dump(mode="json") for recipe in recipes]]))
    return told_by_first(Path(__file__), cases, world_size)


def told_by_first(script: Path, cases: Path, world_size: int, *, seconds: float = SECONDS) -> list[Any]:
    """Run a script with a file of cases on so many new processes; return what the first rank prints, lines of JSON."""
    return told_by_all([script, cases], world_size, seconds=seconds)[0]


def main(cases: str) -> None:
    """Follow each recipe of a file."""
    import torch

    from bigtrain.config.schema import Recipe
    from bigtrain.world import joined

    torch.set_num_threads(1)
    steps, recipes = json.loads(Path(cases).read_text())
    with joined(kind="cpu", timeout_seconds=120) as world:
        for recipe in recipes:
            found = follow(Recipe.model_validate(recipe), steps)
            if world.first:
                print(json.dumps(found), flush=True)


if __name__ == "__main__":
    main(sys.argv[1])
