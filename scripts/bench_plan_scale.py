"""Plan three models on 8 to 16,384 ranks of two devices: benchmarks/scaling_plan.json and docs/img/scaling_*.png.

Everything is predicted; nothing here was run on a GPU. Beside it stand throughputs that others published for runs that
can be planned, each with its source.
"""

from __future__ import annotations

import argparse
import json
import sys
from collections.abc import Mapping, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

from provenance import provenance

from bigtrain.config.load import load_recipe
from bigtrain.planner.hardware import of_name
from bigtrain.planner.plan import plan
from bigtrain.planner.scaling import Scale, scale, scaling_picture, world_sizes

ROOT = Path(__file__).parent.parent
SIZES = world_sizes("8..16384")
RECIPES = ("gpt2_xl", "gpt_7b", "gpt_70b")
DEVICES = ("h100", "a100-80gb")
ROWS = 8
"""Of each rank in weak scaling: with 4,096 tokens a row half a billion tokens a step on 16,384 ranks."""

LAYOUTS = {
    "best of all": (),
    "ZeRO 3 over all ranks": ("sharding.zero_stage=3", "sharding.replicate=1"),
    "ZeRO 3 in groups of 8": ("sharding.zero_stage=3", "sharding.replicate={groups}"),
    "ZeRO 1 over all ranks": ("sharding.zero_stage=1", "sharding.replicate=1"),
}
"""Compared with one row of gpt_7b for each rank, where nothing but the layout is left to choose."""

LLAMA3 = ["data.vocab_size=128256", "data.sequence_length=8192", "model.rope_theta=500000"]
LLAMA3_8B = [
    "model.preset=null",
    "model.hidden_size=4096",
    "model.num_hidden_layers=32",
    "model.num_attention_heads=32",
]
LLAMA3_8B += ["model.num_key_value_heads=8", "model.intermediate_size=14336", *LLAMA3]
TITAN = "pytorch/torchtitan"
TITAN_H100 = f"{TITAN}, benchmarks/llama3_h100_202412_torchtitan.md: tables 1 and 3 (H100 of 96 GB HBM2e at 500 W)"
TITAN_A100 = f"{TITAN}, docs/performance.md of 2024: FSDP2 on 64 A100"
FMS = "foundation-model-stack/fms-fsdp, README"
PUBLISHED: list[dict[str, Any]] = [
    {"model": "Llama 3.1 8B", "device": "h100", "ranks": 8, "rows": 2, "recompute": "selective", "published": 6667},
    {"model": "Llama 3.1 8B", "device": "h100", "ranks": 128, "rows": 2, "recompute": "selective", "published": 6514},
    {"model": "Llama 3 8B", "device": "a100-80gb", "ranks": 64, "rows": 1, "recompute": "selective", "published": 2973},
    {"model": "Llama 3 70B", "device": "a100-80gb", "ranks": 64, "rows": 1, "recompute": "full", "published": 331},
    {"model": "Llama 2 7B", "device": "a100-80gb", "ranks": 128, "rows": 2, "recompute": "none", "published": 3700},
    {"model": "Llama 2 7B", "device": "h100", "ranks": 96, "rows": 2, "recompute": "none", "published": 7500},
]
SOURCES = (TITAN_H100, TITAN_H100, TITAN_A100, TITAN_A100, f"{FMS} (400 Gbit/s a node)", f"{FMS} (800 Gbit/s a node)")


def main() -> int:
    """Write the curves, their pictures and the comparison, and return 0."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--output", type=Path, default=ROOT / "benchmarks" / "scaling_plan.json")
    parser.add_argument("--pictures", type=Path, default=ROOT / "docs" / "img")
    options = parser.parse_args()
    options.pictures.mkdir(parents=True, exist_ok=True)
    strong = {f"{name} on {device}": strongly(name, device) for name in RECIPES for device in DEVICES}
    weak = {f"{name} on {device}": weakly(name, device, ROWS) for name in RECIPES for device in DEVICES}
    layouts = {name: weakly("gpt_7b", "h100", 1, keys) for name, keys in LAYOUTS.items()}
    for name, curves in {"strong": strong, "weak": weak, "layouts": layouts}.items():
        shown = {key: found for key, found in curves.items() if "a100" not in key}
        path = options.pictures / f"scaling_{name}.png"
        scaling_picture(shown, path, title=TITLES[name])
        print(f"{path}: written", flush=True)
    found = {
        "strong": as_objects(strong),
        "weak": as_objects(weak),
        "layouts": as_objects(layouts),
        "published": [compared(case, source) for case, source in zip(PUBLISHED, SOURCES, strict=True)],
        "wide": wide(),
        **provenance(),
    }
    options.output.write_text(json.dumps(found, indent=1) + "\n", encoding="utf-8")
    return 0


TITLES = {
    "strong": "the recipe's global batch",
    "weak": f"{ROWS} rows each",
    "layouts": "gpt_7b, one row each",
}


def strongly(name: str, device: str) -> list[Scale]:
    """Return plans of a recipe as it is: the more ranks, the fewer rows each has."""
    assert isinstance(SIZES, list)
    return scale(load_recipe(name), of_name(device), SIZES)


def weakly(name: str, device: str, rows: int, keys: Sequence[str] = ()) -> list[Scale]:
    """Return plans of a recipe whose global batch grows with the ranks."""
    assert isinstance(SIZES, list)
    found = []
    for size in SIZES:
        written = [key.format(groups=size // 8) for key in keys]
        recipe = load_recipe(name, [f"train.global_batch_size={rows * size}", "train.tokens=10T", *written])
        found += scale(recipe, of_name(device), [size])
    first = next((one.rank_tokens_per_second for one in found if one.choice is not None), 1.0)
    return [replace(one, efficiency=one.rank_tokens_per_second / first) for one in found]


def as_objects(curves: Mapping[str, Sequence[Scale]]) -> dict[str, list[dict[str, object]]]:
    """Return the numbers of curves, without what each collective takes."""
    return {name: [short(one) for one in found] for name, found in curves.items()}


def short(one: Scale) -> dict[str, object]:
    """Return a point's numbers, rounded as people read them."""
    if one.choice is None or one.seconds is None:
        return {"world_size": one.world_size, "reason": one.reason}
    choice = one.choice
    return {
        "world_size": one.world_size,
        "zero_stage": choice.zero_stage,
        "replicate": choice.replicate,
        "micro_batch_size": choice.micro_batch_size,
        "accumulation_steps": choice.accumulation_steps,
        "tokens_per_second_per_rank": round(one.rank_tokens_per_second, 1),
        "efficiency": round(one.efficiency, 4),
        "mfu": round(one.mfu, 4),
        "device_bytes_peak": one.device_bytes,
        "seconds_per_step": round(one.seconds.total, 4),
        "sending_seconds": round(one.sending_seconds, 4),
        "exposed_share": round(one.exposed_share, 4),
    }


def compared(case: Mapping[str, Any], source: str) -> dict[str, object]:
    """Return a published throughput beside the plan of such a run: ZeRO 3, for Llama 2 in groups of 8."""
    ranks, rows = case["ranks"], case["rows"]
    keys = [f"train.global_batch_size={ranks * rows}", f"train.micro_batch_size={rows}", "sharding.zero_stage=3"]
    keys += [f"recompute.policy={case['recompute']}", "sharding.offload=none", "optimizer.state=fp32"]
    keys += LLAMA3_8B if case["model"].endswith("8B") else LLAMA3 if case["model"].startswith("Llama 3 70B") else []
    keys += [f"sharding.replicate={ranks // 8 if case['model'].startswith('Llama 2') else 1}"]
    recipe = load_recipe("gpt_70b" if case["model"].endswith("70B") else "gpt_7b", keys)
    planned = plan(recipe, of_name(case["device"]), world_size=ranks, bounded=False)
    rate = planned.tokens_per_second / ranks
    return {
        **case,
        "source": source,
        "predicted": round(rate),
        "predicted_mfu": round(planned.mfu, 3),
        "ratio": round(rate / case["published"], 2),
    }


def wide() -> dict[str, object]:
    """Return what a rank of 2,048 does against one of 128, fully sharded, where the measured one loses 37%.

    The abstracts do not say how many rows a rank has, which decides: one and two are planned.
    """
    keys = ["sharding.zero_stage=3", "sharding.replicate=1", "sharding.offload=none", "recompute.policy=none"]
    predicted = {}
    for rows in (1, 2):
        few, many = (
            scale(load_recipe("gpt_7b", [f"train.global_batch_size={rows * size}", *keys]), of_name("h100"), [size])[0]
            for size in (128, 2048)
        )
        predicted[f"{rows} of 4,096 tokens"] = round(many.rank_tokens_per_second / few.rank_tokens_per_second, 4)
    source = "Fernandez et al. 2024, arXiv 2411.13055: Llama 7B, FSDP on H100, 37.22% less at 2,048 than at 128"
    return {"source": source, "published": 0.6278, "predicted": predicted}


if __name__ == "__main__":
    sys.exit(main())
