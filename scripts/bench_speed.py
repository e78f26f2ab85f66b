"""Hold predicted seconds of a step against real steps on this CPU, into benchmarks/speed_prediction.json.

    python scripts/bench_speed.py            every case that the file does not have yet
    python scripts/bench_speed.py --again bert-256
    python scripts/bench_speed.py --predict  predict anew, from the rates that were measured beside each case

Each case is a model of a shape with everything that the planner may choose from, in a process of its own: one thread,
memory mapped as `bigtrain launch` has it, rates measured first. What counts is the processor time of the steps, so that
other work on the machine changes little. Of every case the file holds predicted and measured seconds of each choice,
and for five memory budgets the tokens/s of the choice that is predicted to be the fastest that fits, as a share of the
fastest one's that was measured.
"""

from __future__ import annotations

import argparse
import itertools
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

from bigtrain.data.cache import cache_folder
from bigtrain.planner.rates import KEPT_FILE, read_kept

RESULT = Path("benchmarks/speed_prediction.json")
WARM_UP_STEPS, TIMED_STEPS = 1, 8
POLICIES = ("none", "selective", "full")
BUDGETS = 5

BASE = ["data.source=embedded", "train.device=cpu", "train.steps=1000", "sharding.zero_stage=0",
        "sharding.replicate=1", "sharding.offload=none", "memory.budget=64GiB", "train.compile=false"]  # fmt: skip


def shape(family: str, width: int, blocks: int, length: int, rows: int, vocabulary: int, *more: str) -> list[str]:
    """Return overrides of a quickstart recipe."""
    return [
        *(f"model.{key}={value}" for key, value in (("hidden_size", width), ("num_hidden_layers", blocks))),
        f"model.num_attention_heads={max(2, width // 64)}",
        f"model.family={family}",
        f"train.objective={'mlm' if family == 'bert' else 'clm'}",
        f"data.vocab_size={vocabulary}",
        f"data.sequence_length={length}",
        f"train.global_batch_size={rows}",
        *more,
    ]


LOW = ("amp.precision=bf16", "amp.master_weights=split24", "optimizer.state=8bit")
CASES: dict[str, tuple[list[str], list[int]]] = {
    "gpt-256": (shape("gpt", 256, 3, 128, 8, 2048), [1, 2, 8]),
    "bert-256-dropout": (shape("bert", 256, 3, 128, 8, 4096, "train.dropout=0.1"), [1, 2, 8]),
    "bert-384-low": (shape("bert", 384, 2, 128, 4, 4096, *LOW), [1, 4]),
    "gpt-128-long": (shape("gpt", 128, 2, 512, 4, 1024), [1, 4]),
    "llama-256": (shape("llama", 256, 3, 128, 4, 2048), [1, 4]),
    "gpt-384-4bit": (shape("gpt", 384, 2, 256, 2, 2048, "optimizer.state=4bit"), [1, 2]),
    "bert-512": (shape("bert", 512, 2, 128, 4, 4096), [1, 4]),
    "gpt-512-lamb": (shape("gpt", 512, 2, 128, 4, 2048, "optimizer.name=lamb"), [1, 4]),
}


def main() -> None:
    """Run what is missing and sum up."""
    options = _options()
    if options.case:
        print("RESULT " + json.dumps(run_case(options.case)))
        return
    for name in _read().get("cases", {}) if options.predict else ():
        _keep(name, predict_case(name))
    for name in () if options.predict else CASES:
        if name in options.again or name not in _read().get("cases", {}):
            _keep(name, _in_process(name))
    print(json.dumps(_read()["summary"], indent=1))


def run_case(name: str) -> dict[str, Any]:
    """Take steps of every choice of a case."""
    from bigtrain.training import peak

    overrides, sizes = CASES[name]
    peak.CLOCK = time.process_time
    plan = _plan(overrides, sizes[0], "none")
    for precision in ("fp32", "bf16"):
        peak.peak_flops(plan.hardware, precision, cache_folder(plan.recipe.data))
    steppers = [_Stepper(_plan(overrides, size, policy)) for size, policy in itertools.product(sizes, POLICIES)]
    for _ in range(WARM_UP_STEPS + TIMED_STEPS):  # in turn, so that other work slows all of them alike
        for stepper in steppers:
            stepper.step()
    rates = read_kept(cache_folder(plan.recipe.data) / KEPT_FILE)
    return {"rates": rates, "choices": [_row(stepper.plan, stepper.seconds[WARM_UP_STEPS:]) for stepper in steppers]}


def predict_case(name: str) -> dict[str, Any]:
    """Return a measured case with its predictions made anew."""
    case = _read()["cases"][name]
    with tempfile.TemporaryDirectory() as folder:
        os.environ |= {"BIGTRAIN_CACHE": folder, "OMP_NUM_THREADS": "1"}
        Path(folder, KEPT_FILE).write_text(json.dumps(case["rates"]), encoding="utf-8")
        choices = [
            _row(_plan(CASES[name][0], row["micro_batch_size"], row["recompute"]), row["measured_steps"])
            for row in case["choices"]
        ]
    return {**case, "choices": choices}


def _plan(overrides: list[str], size: int, policy: str) -> Any:
    import bigtrain
    from bigtrain.planner.hardware import cpu

    keys = [*BASE, *overrides, f"train.micro_batch_size={size}", f"recompute.policy={policy}"]
    recipe = "recipes/quickstart_bert.yaml" if "model.family=bert" in overrides else "recipes/quickstart_gpt.yaml"
    return bigtrain.plan(bigtrain.load_recipe(recipe, keys), cpu())


class _Stepper:
    """An engine and full rows of one document each."""

    def __init__(self, plan: Any) -> None:
        from bigtrain.training.loop import build_engine

        self.plan, self._engine, self._batch = plan, build_engine(plan), _batch(plan)
        self.seconds: list[float] = []

    def step(self) -> None:
        """Take a step and note its processor time."""
        begin = time.process_time()
        for micro in self._engine.micro_batches(self._batch):
            self._engine.backward(self._engine.model(**micro))
        self._engine.step(self.plan.recipe.train.max_grad_norm)
        self.seconds.append(time.process_time() - begin)


def _row(plan: Any, measured: list[float]) -> dict[str, Any]:
    """Return a choice, predicted and measured; of its steps the quickest, since other work only adds to them."""
    from bigtrain.memory.predict import predict
    from bigtrain.planner.choice import Choice
    from bigtrain.planner.speed import Speed

    speed = Speed(plan.recipe, plan.model, plan.hardware, 1)
    seconds = speed.seconds(Choice.of(plan.recipe, plan.model.num_hidden_layers, 1))
    memory = predict(plan.recipe, plan.model, device="cpu", slow_bf16=plan.hardware.slow_bf16)
    print(
        plan.micro_batch_size,
        plan.recipe.recompute.policy,
        f"{seconds.total:.3f} {min(measured):.3f}",
        file=sys.stderr,
        flush=True,
    )
    return {
        "micro_batch_size": plan.micro_batch_size,
        "recompute": plan.recipe.recompute.policy,
        "allocated_bytes_peak": memory.allocated_bytes_peak,
        "predicted_seconds": seconds.total,
        "predicted": {key: getattr(seconds, key) for key in seconds.__dataclass_fields__},
        "measured_seconds": min(measured),
        "measured_steps": measured,
        "rates": speed.source,
    }


def _batch(plan: Any) -> dict[str, Any]:
    """Return rows as the loader would: tokens drawn evenly, labels at as many places as the objective has."""
    import torch

    recipe, generator = plan.recipe, torch.Generator().manual_seed(1)
    rows, length = recipe.train.global_batch_size, recipe.data.sequence_length
    ids = torch.randint(5, plan.model.vocab_size, (rows, length), generator=generator)
    labels = ids
    if recipe.train.objective == "mlm":
        labels = torch.full_like(ids, -100)
        count = max(1, round(recipe.train.masking_probability * length))
        for row in range(rows):
            places = torch.randperm(length, generator=generator)[:count]
            labels[row, places] = ids[row, places]
    lengths = torch.tensor([[length]] * rows, dtype=torch.int32)
    return {"input_ids": ids, "labels": labels, "document_lengths": lengths}


def summarize(cases: dict[str, dict[str, Any]]) -> dict[str, Any]:
    """Return the errors of times, of ratios between choices, and how good the predicted best is, over all cases."""
    absolute, ratios, shares = [], [], []
    for rows in (case["choices"] for case in cases.values()):
        errors = [row["predicted_seconds"] / row["measured_seconds"] for row in rows]
        middle = statistics.median(errors)
        absolute += [abs(error - 1) for error in errors]
        ratios += [abs(error / middle - 1) for error in errors]
        shares += at_budgets(rows)
    return {
        "choices": len(absolute),
        "seconds_error": {"median": statistics.median(absolute), "worst": max(absolute)},
        "ratio_error": {"median": statistics.median(ratios), "worst": max(ratios)},
        "share_of_the_best": {"median": statistics.median(shares), "worst": min(shares), "budgets": len(shares)},
    }


def at_budgets(rows: list[dict[str, Any]]) -> list[float]:
    """Return the speed of what is predicted to be fastest, as a share of the fastest, at budgets from least to most."""
    sizes = sorted(row["allocated_bytes_peak"] for row in rows)
    budgets = [sizes[0] + (sizes[-1] - sizes[0]) * part / (BUDGETS - 1) for part in range(BUDGETS)]
    found = []
    for budget in budgets:
        fitting = [row for row in rows if row["allocated_bytes_peak"] <= budget]
        chosen = min(fitting, key=lambda row: row["predicted_seconds"])
        found.append(min(row["measured_seconds"] for row in fitting) / chosen["measured_seconds"])
    return found


def _in_process(name: str) -> Any:
    from bigtrain.launcher import worker_environment

    with tempfile.TemporaryDirectory() as folder:
        environment = worker_environment("cpu") | {"OMP_NUM_THREADS": "1", "BIGTRAIN_CACHE": folder}
        argv = [sys.executable, __file__, "--case", name]
        ran = subprocess.run(argv, check=True, text=True, stdout=subprocess.PIPE, env={**os.environ, **environment})
    return json.loads(ran.stdout.rpartition("RESULT ")[2])


def _read() -> dict[str, Any]:
    found: dict[str, Any] = json.loads(RESULT.read_text(encoding="utf-8")) if RESULT.is_file() else {}
    return found


def _keep(name: str, case: dict[str, Any]) -> None:
    """Add a case to the file, which is whole at any time."""
    result = _read()
    result.setdefault("cases", {})[name] = case
    result["summary"] = summarize(result["cases"])
    result["shapes"] = {key: overrides for key, (overrides, _) in CASES.items()}
    result["provenance"] = provenance()
    aside = RESULT.with_suffix(".tmp")
    aside.write_text(json.dumps(result, indent=1) + "\n", encoding="utf-8")
    aside.replace(RESULT)


def _options() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description="Hold predicted seconds of a step against real steps on this CPU.")
    parser.add_argument("--again", nargs="*", default=[], choices=list(CASES))
    parser.add_argument("--predict", action="store_true", help="predict anew, measure nothing")
    parser.add_argument("--case", choices=list(CASES), help=argparse.SUPPRESS)
    return parser.parse_args()


if __name__ == "__main__":
    main()
