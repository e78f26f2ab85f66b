"""Measure what recompute policies cost a block in Python on a CPU, into benchmarks/recompute_cpu.json.

    python scripts/bench_recompute.py

Blocks so narrow, on so few tokens, that arithmetic takes no time. What counts is the processor time of a step, the
least of many, the policies in turn; what a policy adds is divided among the blocks.
"""

from __future__ import annotations

import json
from pathlib import Path

from bench_speed import BASE, Stepper
from provenance import provenance
from speed_cases import shape

import bigtrain
from bigtrain.planner.hardware import cpu

RESULT = Path("benchmarks/recompute_cpu.json")
WIDTH, BLOCKS, TOKENS, STEPS = 64, 6, 8, 40
POLICIES = ("none", "selective", "full")


def main() -> None:
    """Measure each family."""
    import torch

    torch.set_num_threads(1)
    shape_measured = {"hidden_size": WIDTH, "num_hidden_layers": BLOCKS, "tokens": TOKENS, "threads": 1}
    found = {family: measure(family) for family in ("bert", "gpt", "llama")}
    result = {"shape": shape_measured, "seconds_per_block": found, "provenance": provenance()}
    RESULT.write_text(json.dumps(result, indent=1) + "\n", encoding="utf-8")
    print(json.dumps(found, indent=1))


def measure(family: str) -> dict[str, float]:
    """Return the seconds that each policy adds to a block."""
    base = "recipes/quickstart_bert.yaml" if family == "bert" else "recipes/quickstart_gpt.yaml"
    keys = [*BASE, *shape(family, WIDTH, BLOCKS, TOKENS, 1, 512), "train.micro_batch_size=1"]
    steppers = {
        policy: Stepper(bigtrain.plan(bigtrain.load_recipe(base, [*keys, f"recompute.policy={policy}"]), cpu()))
        for policy in POLICIES
    }
    for _ in range(STEPS):
        for stepper in steppers.values():
            stepper.step()
    least = {policy: min(stepper.seconds) for policy, stepper in steppers.items()}
    return {policy: (least[policy] - least["none"]) / BLOCKS for policy in POLICIES[1:]}


if __name__ == "__main__":
    main()
