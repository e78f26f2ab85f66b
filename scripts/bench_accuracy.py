"""Measure how far predicted peaks are from measured ones, on random recipes: benchmarks/plan_accuracy.json.

    python scripts/bench_accuracy.py [--count 60] [--seed 1000]

Each recipe is planned as `bigtrain plan` plans it and then trained for a few steps under torch's profiler, as
`bigtrain profile` does it. What is compared is everything that is alive: weights, states, activations.
"""

from __future__ import annotations

import argparse
import json
import random
import statistics
from pathlib import Path
from typing import Any

from provenance import provenance

import bigtrain
from bigtrain.profiling import profile

OUTPUT = Path(__file__).parents[1] / "benchmarks" / "plan_accuracy.json"
QUICK = ("data.source=embedded", "train.device=cpu", "train.compile=false", "train.eval_every=null", "train.steps=3")


def random_recipe(draw: random.Random) -> tuple[str, list[str]]:
    """Return a shipped recipe's name and random changes of everything that memory depends on."""
    family = draw.choice(["bert", "gpt", "llama"])
    layers, heads, micro = draw.randint(2, 6), draw.choice([2, 4, 8]), draw.randint(1, 6)
    policies = ["none", "selective", "full"]
    mix = "[" + ", ".join(draw.choice(policies) for _ in range(layers)) + "]"
    precision = draw.choice(["fp32", "bf16"])
    released = draw.random() < 0.3
    steps = 1 if released else draw.randint(1, 3)
    name = draw.choice(["adamw", "lamb", "muon", "adafactor"])
    return ("quickstart_bert" if family == "bert" else "quickstart_gpt"), [
        f"model.family={family}",
        "model.preset=null",
        f"model.hidden_size={heads * draw.choice([16, 32, 64])}",
        f"model.num_hidden_layers={layers}",
        f"model.num_attention_heads={heads}",
        f"model.intermediate_size={draw.choice([128, 384, 1024])}",
        "model.max_position_embeddings=512",
        f"data.vocab_size={draw.choice([1024, 4096, 8192])}",
        f"data.sequence_length={draw.choice([64, 128, 256, 512])}",
        f"train.micro_batch_size={micro}",
        f"train.global_batch_size={micro * steps}",
        f"train.dropout={draw.choice([0, 0.1])}",
        f"train.max_grad_norm={'null' if released else draw.choice(['null', '1.0'])}",
        f"optimizer.name={name}",
        f"optimizer.state={'fp32' if name == 'adafactor' else draw.choice(['fp32', 'bf16', '8bit', '4bit'])}",
        f"optimizer.gradient_release={str(released).lower()}",
        f"amp.precision={precision}",
        f"amp.master_weights={draw.choice(['fp32', 'split24', 'none']) if precision == 'bf16' else 'fp32'}",
        f"recompute.policy={draw.choice([*policies, mix])}",
    ]


def measured(seed: int) -> dict[str, Any]:
    """Return a random recipe with its predicted and measured peak."""
    recipe, edits = random_recipe(random.Random(seed))
    found = profile(bigtrain.plan(bigtrain.load_recipe(recipe, [*QUICK, *edits]))).as_object()
    predicted, real = (found[side]["allocated_bytes_peak"] for side in ("predicted", "measured"))
    print(f"{seed}: predicted {predicted:,}, measured {real:,}: {predicted / real - 1:+.4%}", flush=True)
    return {"seed": seed, "recipe": recipe, "edits": edits, "predicted_bytes": predicted, "measured_bytes": real}


def main() -> None:
    """Measure and write."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--count", type=int, default=60)
    parser.add_argument("--seed", type=int, default=1000)
    options = parser.parse_args()
    rows = [measured(options.seed + index) for index in range(options.count)]
    errors = [abs(row["predicted_bytes"] / row["measured_bytes"] - 1) for row in rows]
    found = {
        **provenance(),
        "worst_error": max(errors),
        "median_error": statistics.median(errors),
        "recipes": rows,
    }
    OUTPUT.write_text(json.dumps(found, indent=1) + "\n")
    print(f"worst {max(errors):.4%}, median {statistics.median(errors):.4%}; written to {OUTPUT}")


if __name__ == "__main__":
    main()
