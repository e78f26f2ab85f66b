"""Tables of speed for README.md and docs/performance.md, from what is measured under benchmarks/."""

from __future__ import annotations

import json
import sys
from pathlib import Path
from typing import Any, NamedTuple

ROOT = Path(__file__).parents[1]
SPEED, MEASURED = ROOT / "benchmarks" / "speed", ROOT / "benchmarks" / "measured"
NOT_MEASURED = "not measured"

CPU_WORKS = {
    "gpt-small-cpu": ("GPT, full rows", 1.3, 0.5),
    "bert-small-cpu": ("BERT, full rows", 1.4, 0.5),
    "bert-small-cpu-documents": ("BERT, documents of mean length 100", 2.5, None),
}
"""By name: what it is, and the goals for tokens/s and resident memory over the Trainer's."""


class GpuWork(NamedTuple):
    """What a work is, a published figure, the goals on one H200, and the tokens of what is counted."""

    title: str
    elsewhere: str
    goals: str
    unit: str
    tokens: int = 1


GPU_WORKS = {
    "bert-large-512": GpuWork(
        "BERT-Large, packed rows of 512", "about 500 rows/s (MLPerf v4.0, H200, FP8); 52 (DeepSpeed, V100)", "485, 582",
        "rows/s", 512,
    ),
    "bert-large-128": GpuWork(
        "BERT-Large, full rows of 128", "580 (NVIDIA, A100); 272 (DeepSpeed, V100)", "2,056, 2,467", "rows/s", 128
    ),
    "gpt2-124m": GpuWork("GPT-2 124M, 1024", "468,000 (llm.c, H100)", "579,000", "tokens/s"),
    "gpt2-xl": GpuWork("GPT-2 XL 1.5B, 1024", "46,800 to 48,500 (llm.c, H100)", "50,000, 57,800", "tokens/s"),
    "llama-7b": GpuWork("Llama-style 7B, 2048", "13,800 (LLM.Q, H100); 10,600 of 8 (MosaicML)", "11,500, 13,800",
                        "tokens/s"),
}  # fmt: skip


def cpu_table() -> list[str]:
    """Return rows of bigtrain beside transformers' Trainer on two cores, with when and of which commit."""
    lines = ["| work | tokens/s over the Trainer's | goal | rounds | resident peak over its | goal | measured |",
             "|---|---|---|---|---|---|---|"]  # fmt: skip
    for name, (title, speed, memory) in CPU_WORKS.items():
        found = _last_summary(SPEED / f"{name}.jsonl")
        goal = "" if memory is None else f"{memory}"
        if found is None:
            lines.append(f"| {title} | {NOT_MEASURED} | {speed} | | | {goal} | |")
            continue
        beside = found["summary"]["hf"]
        ratio, share = beside["bigtrain_ratio"], beside["bigtrain_memory_ratio"]
        rounds = f"{len(ratio['rounds'])}: {min(ratio['rounds']):.2f} to {max(ratio['rounds']):.2f}"
        lines.append(
            f"| {title} | {ratio['median']:.2f} | {speed} | {rounds} | {share:.2f} | {goal} | {_when(found)} |"
        )
    return lines


def gpu_table() -> list[str]:
    """Return the rows of one H200: what others published, the goals, what is predicted and what was measured."""
    lines = ["| one H200, bf16 | elsewhere | goal | predicted | measured |", "|---|---|---|---|---|"]
    for name, work in GPU_WORKS.items():
        guess = f"{_rounded(_predicted(name) / work.tokens)} {work.unit}"
        lines.append(f"| {work.title} | {work.elsewhere} | {work.goals} | {guess} | {_measured(name, work)} |")
    return lines


def _predicted(name: str) -> float:
    """Return the tokens/s that the planner predicts of a work."""
    sys.path.insert(0, str(Path(__file__).parent))
    from arms.works import WORKS

    import bigtrain
    from bigtrain.planner.hardware import of_name

    work = WORKS[name]
    batch = [f"train.micro_batch_size={work.rows}", f"train.global_batch_size={work.rows * work.accumulation}"]
    recipe = bigtrain.load_recipe(work.recipe, [*work.overrides, *batch, "cluster.devices_per_node=1"])
    return float(bigtrain.plan(recipe, of_name("h200")).tokens_per_second)


def _measured(name: str, work: GpuWork) -> str:
    found = [_last_summary(path) for path in sorted(MEASURED.glob(f"*h200*/**/*{name}.jsonl"))]
    ours = [one["summary"]["bigtrain"] for one in found if one is not None and "bigtrain" in one["summary"]]
    rates = [one["tokens_per_second"] for one in ours if "not_run" not in one]
    return f"{_rounded(rates[-1] / work.tokens)} {work.unit}" if rates else NOT_MEASURED


def _rounded(rate: float) -> str:
    """Return a rate to three digits."""
    return f"{float(f'{rate:.3g}'):,.0f}"


def _last_summary(path: Path) -> dict[str, Any] | None:
    if not path.is_file():
        return None
    lines = [json.loads(line) for line in path.read_text(encoding="utf-8").splitlines()]
    return next((line for line in reversed(lines) if "summary" in line), None)


def _when(found: dict[str, Any]) -> str:
    return f"{found['date'][:10]}, {found['commit'][:7]}, torch {found['versions']['torch']}"


TABLES = {"speed on a CPU": cpu_table, "speed on a GPU": gpu_table}
