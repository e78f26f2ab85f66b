"""The loops of docs/accelerate.md: `ranks_of_docs.py RECIPE STEPS`, run on ranks that torchrun's variables tell of.

The first rank prints what each loop found, as a line of JSON.
"""

from __future__ import annotations

import json
import os
import re
import sys
from collections.abc import Iterator
from itertools import islice
from pathlib import Path
from typing import Any

PAGE = Path(__file__).parents[2] / "docs" / "accelerate.md"
ROWS, LENGTH, VOCABULARY = 32, 24, 64


def loops() -> list[str]:
    """Return the loops that the page shows: Accelerate's, and one of one's own."""
    return re.findall(r"```python\n(.*?)```", PAGE.read_text(encoding="utf-8"), re.DOTALL)


def changed(loop: str, *changes: tuple[str, str]) -> str:
    """Return a loop with something else written in some places, each there exactly once."""
    for shown, wanted in changes:
        assert loop.count(shown) == 1, shown
        loop = loop.replace(shown, wanted)
    return loop


def gpt2(*, dropout: float) -> Any:
    """Return a small GPT-2 of transformers, always the same."""
    import torch
    from transformers import GPT2Config, GPT2LMHeadModel

    torch.manual_seed(0)
    probabilities = dict.fromkeys(("resid_pdrop", "embd_pdrop", "attn_pdrop"), dropout)
    shape = {"n_embd": 32, "n_layer": 3, "n_head": 4, "vocab_size": VOCABULARY, "n_positions": LENGTH}
    config = GPT2Config(**shape, **probabilities, use_cache=False, bos_token_id=1, eos_token_id=1)
    return GPT2LMHeadModel(config).train()


def rows() -> list[dict[str, Any]]:
    """Return rows that all have as many labels: those of unequal ones Accelerate weighs by the row."""
    import torch

    ids = torch.randint(2, VOCABULARY, (ROWS, LENGTH), generator=torch.Generator().manual_seed(1))
    return [{"input_ids": row, "labels": row} for row in ids]


def follow_accelerate(policy: str, precision: str, *changes: tuple[str, str], dropout: float = 0.0) -> dict[str, Any]:
    """Run Accelerate's loop with a policy, a precision and other changes; return its names."""
    import torch
    from accelerate.state import AcceleratorState, GradientState

    AcceleratorState._reset_state(reset_partial_state=True)
    GradientState._reset_state()
    loop = changed(loops()[0], ('"selective"', repr(policy)), ('"bf16"', repr(precision)), *changes)
    names: dict[str, Any] = {"model": gpt2(dropout=dropout), "rows": rows()}
    torch.manual_seed(3)
    exec(loop, names)
    return names


def follow_engine(recipe: str, steps: int) -> dict[str, Any]:
    """Run the loop of one's own with the model, rows and optimizer of the shipped one; return its names."""
    import torch

    import bigtrain
    from bigtrain.data.ensure import ensure_prepared
    from bigtrain.training.build import build_loader, build_plan_model
    from bigtrain.world import World

    written = bigtrain.load_recipe(recipe)

    def batches(rank: int, size: int) -> Iterator[Any]:
        plan = bigtrain.plan(written, world_size=size)
        loader = build_loader(plan, ensure_prepared(written), World(rank, size, rank, size))
        yield from islice(loader, steps)
        loader.close()

    with torch.device("meta"):
        model = build_plan_model(bigtrain.plan(written, world_size=1))
    names = {"model": model, "optimizer": lambda held: optimizer_of(written, held), "batches": batches}
    exec(changed(loops()[1], ("recipes/bert_large.yaml", recipe)), names)
    return names


def follow_planned_model() -> list[float]:
    """Run the loop of one's own with a model that no recipe describes; return its losses."""
    from functools import partial

    import torch

    whole = {name: torch.stack([row[name] for row in rows()[:8]]) for name in ("input_ids", "labels")}

    def batches(rank: int, size: int) -> Iterator[Any]:
        share = 8 // size
        for _ in range(3):
            yield {name: tensor[rank * share : (rank + 1) * share] for name, tensor in whole.items()}

    rows_asked = 'global_batch_size=8, micro_batch_size=2, recompute="none", device="cpu", causal=True'
    planned = f"bigtrain.plan_model(model, sample, world_size=world.size, {rows_asked})"
    optimizer = partial(torch.optim.AdamW, lr=1e-2)
    names = {"model": gpt2(dropout=0.0), "optimizer": optimizer, "batches": batches, "sample": whole}
    unread = ('bigtrain.load_recipe("recipes/bert_large.yaml")', "None")
    exec(changed(loops()[1], unread, ("bigtrain.plan(recipe, world_size=world.size)", planned)), names)
    losses: list[float] = names["losses"]
    return losses


def optimizer_of(recipe: Any, held: Any) -> Any:
    """Return the optimizer of a recipe on parameters that it is given."""
    from bigtrain.optim.build import build_optimizer

    return build_optimizer(list(held), recipe.optimizer, master_weights=recipe.amp.master_weights)


def main(recipe: str, steps: int) -> None:
    """Run the loops; on several ranks each begins with a port of its own."""
    import torch
    import torch.distributed as dist

    torch.set_num_threads(1)
    found: dict[str, Any] = {"engine": follow_engine(recipe, steps)["losses"]}
    os.environ["MASTER_PORT"] = str(int(os.environ["MASTER_PORT"]) + 1)
    found["planned"] = follow_planned_model()
    os.environ["MASTER_PORT"] = str(int(os.environ["MASTER_PORT"]) + 1)
    for name, policy, precision in (("plain", "none", "fp32"), ("full", "full", "fp32"), ("bf16", "selective", "bf16")):
        names = follow_accelerate(policy, precision)
        losses = torch.stack(names["losses"]).double()
        dist.all_reduce(losses, dist.ReduceOp.AVG)
        found[name] = losses.tolist()
        found[f"{name} wrapped in"] = type(names["model"]).__name__
    try:
        follow_accelerate("none", "fp32", ("cpu=not torch.cuda.is_available()", "cpu=False"))
    except RuntimeError as error:
        found["refused"] = str(error)
    if os.environ["RANK"] == "0":
        print(json.dumps(found), flush=True)


if __name__ == "__main__":
    main(sys.argv[1], int(sys.argv[2]))
