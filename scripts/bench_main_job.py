"""Measure the main job from outside: start-up, learning of the quickstarts, resident memory of BERT-Large.

    python scripts/bench_main_job.py startup --output benchmarks/startup.json
    python scripts/bench_main_job.py quickstart --seeds 1 2 3 --output benchmarks/quickstart.json
    python scripts/bench_main_job.py memory --output benchmarks/memory_bert_large.json
    python scripts/bench_main_job.py memory --arm hf --output benchmarks/memory_bert_large_hf.json

Everything runs in processes of its own, one after another. Prints one JSON object.
"""

from __future__ import annotations

import argparse
import json
import os
import statistics
import subprocess
import sys
import tempfile
import time
from pathlib import Path
from typing import Any

from provenance import provenance

BERT_LARGE = [
    "launch", "recipes/bert_large.yaml", "data.source=embedded", "train.steps=3", "train.global_batch_size=8",
    "data.sequence_length=128", "train.device=cpu",
]  # fmt: skip
STARTUP_RUNS = 9
SAMPLE_SECONDS = 0.05

HF_ARM = """
import torch, transformers
from transformers import BertConfig, BertForMaskedLM, Trainer, TrainingArguments
size = dict(hidden_size=1024, num_hidden_layers=24, num_attention_heads=16, intermediate_size=4096)
config = BertConfig(vocab_size=30522, **size)
ids = torch.randint(5, 30522, (24, 128))
labels = torch.where(torch.rand(24, 128) < 0.15, ids, -100)
rows = [{"input_ids": i, "labels": l} for i, l in zip(ids, labels)]
arguments = TrainingArguments(output_dir=FOLDER, per_device_train_batch_size=8, max_steps=3, use_cpu=True, report_to=[],
                              save_strategy="no", logging_strategy="no", disable_tqdm=True)
Trainer(model=BertForMaskedLM(config), args=arguments, train_dataset=rows).train()
"""


def main() -> None:
    """Run one of the measurements and print its result."""
    options = _options()
    measured = {"startup": startup, "quickstart": quickstart, "memory": memory}[options.what](options)
    text = json.dumps({**provenance(), **measured}, indent=1)
    if options.output:
        options.output.write_text(text + "\n", encoding="utf-8")
    print(text)


def startup(_options: argparse.Namespace) -> dict[str, Any]:
    """Time the commands that must answer at once, in seconds of wall time."""
    found = {}
    for argv in (["--help"], ["recipes"], ["plan", "bert_large", "train.device=cpu"]):
        seconds = []
        for _ in range(STARTUP_RUNS):
            begin = time.perf_counter()
            subprocess.run([sys.executable, "-m", "bigtrain", *argv], check=True, capture_output=True)
            seconds.append(time.perf_counter() - begin)
        found["bigtrain " + " ".join(argv)] = {"median_seconds": statistics.median(seconds), "seconds": seconds}
    return {"commands": found}


def quickstart(options: argparse.Namespace) -> dict[str, Any]:
    """Train both quickstarts with each seed; report the evaluation beside the unigram cross-entropy."""
    runs = []
    with tempfile.TemporaryDirectory() as folder:
        for name in options.recipes:
            for seed in options.seeds:
                run = Path(folder, f"{name}-{seed}")
                argv = ["launch", f"recipes/{name}.yaml", f"seed={seed}", "train.device=cpu", "--run-dir", str(run)]
                subprocess.run([sys.executable, "-m", "bigtrain", *argv], check=True, stdout=sys.stderr)
                runs.append({"recipe": name, "seed": seed, **_learned(run)})
    return {"runs": runs}


def _learned(run: Path) -> dict[str, Any]:
    rows = [json.loads(line) for line in (run / "metrics.jsonl").read_text().splitlines()]
    evaluations = [row for row in rows if "eval_loss" in row]
    last, steps = evaluations[-1], [row for row in rows if "loss" in row]
    return {
        "steps": last["step"],
        "tokens": last["tokens"],
        "stepping_seconds": steps[-1]["seconds"],
        "tokens_per_second": statistics.median(row["tokens_per_second"] for row in steps),
        "eval_loss": last["eval_loss"],
        "eval_unigram_loss": last["eval_unigram_loss"],
        "below_unigram": last["eval_unigram_loss"] - last["eval_loss"],
        "eval_accuracy": last["eval_accuracy"],
        "evaluations": {str(row["step"]): row["eval_loss"] for row in evaluations},
    }


def memory(options: argparse.Namespace) -> dict[str, Any]:
    """Measure the resident peak of three steps of BERT-Large, 8 rows of 128 tokens, with all child processes."""
    with tempfile.TemporaryDirectory() as folder:
        if options.arm == "hf":
            argv = [sys.executable, "-c", HF_ARM.replace("FOLDER", repr(folder))]
        else:
            prepared = [sys.executable, "-m", "bigtrain", "prepare", *BERT_LARGE[1:]]
            subprocess.run(prepared, check=True, stdout=sys.stderr)
            argv = [sys.executable, "-m", "bigtrain", *BERT_LARGE, *options.overrides, "--run-dir", f"{folder}/run"]
        begin = time.perf_counter()
        peak = resident_peak(argv)
        return {
            "arm": options.arm,
            "overrides": options.overrides,
            "resident_peak_bytes": peak,
            "resident_peak_gib": round(peak / 2**30, 3),
            "seconds": time.perf_counter() - begin,
        }


def resident_peak(argv: list[str]) -> int:
    """Run a command and return the most memory that it and all its descendants had resident, sampled from outside."""
    process, peak = subprocess.Popen(argv, stdout=sys.stderr), 0
    while process.poll() is None:
        peak = max(peak, sum(map(_resident, [process.pid, *_descendants(process.pid)])))
        time.sleep(SAMPLE_SECONDS)
    if process.returncode:
        raise SystemExit(f"{' '.join(argv)[:200]}: exit {process.returncode}")
    return peak


def _descendants(parent: int) -> list[int]:
    children: dict[int, list[int]] = {}
    for stat in Path("/proc").glob("[0-9]*/stat"):
        try:
            children.setdefault(int(stat.read_text().rpartition(")")[2].split()[1]), []).append(int(stat.parent.name))
        except OSError:
            continue
    found, todo = [], [parent]
    while todo:
        here = children.get(todo.pop(), [])
        found += here
        todo += here
    return found


def _resident(process: int) -> int:
    try:
        return int(Path(f"/proc/{process}/statm").read_text().split()[1]) * os.sysconf("SC_PAGE_SIZE")
    except OSError:
        return 0


def _options() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description="Measure the main job from outside.")
    parser.add_argument("what", choices=["startup", "quickstart", "memory"])
    parser.add_argument("overrides", nargs="*", help="recipe keys to change (memory)")
    parser.add_argument("--arm", choices=["bigtrain", "hf"], default="bigtrain")
    parser.add_argument("--seeds", type=int, nargs="+", default=[1234])
    parser.add_argument("--recipes", nargs="+", default=["quickstart_bert", "quickstart_gpt"])
    parser.add_argument("--output", type=Path)
    return parser.parse_intermixed_args()


if __name__ == "__main__":
    main()
