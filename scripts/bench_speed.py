"""Hold predicted seconds of a step against real steps on this CPU, into benchmarks/speed_prediction.json.

    python scripts/bench_speed.py            every case that the file does not have yet
    python scripts/bench_speed.py --again bert-256
    python scripts/bench_speed.py --predict  predict anew, from the rates that were measured beside each case

Each case is a model of a shape with what the planner may choose from, in a process of its own: one thread, memory
mapped as `bigtrain launch` has it, rates measured beside it. What counts is the processor time of the steps, so that
other work on the machine changes little. The file holds predicted and measured seconds of each choice, and for five
memory budgets the speed of the choice that is made, as a share of the fastest one's that was measured. Cases that the
rates were fitted to and cases held out from that are summed up apart: of those held out every choice is measured, and
it is the planner itself that chooses.
"""

from __future__ import annotations

import argparse
import itertools
import json
import os
import subprocess
import sys
import tempfile
import time
from functools import partial
from pathlib import Path
from typing import Any

from provenance import provenance
from speed_cases import FITTED, HELD_OUT
from speed_errors import at_budgets, budgets, summarize

from bigtrain.data.cache import cache_folder
from bigtrain.planner.rates import KEPT_FILE, read_kept

RESULT = Path("benchmarks/speed_prediction.json")
WARM_UP_STEPS, LEAST_STEPS, MOST_STEPS = 1, 5, 16
MEASURED_SECONDS = 12
"""Of a case: it takes more steps of each choice while there is time."""

POLICIES = ("none", "selective", "full")
CASES = [*FITTED, *HELD_OUT]

BASE = ["data.source=embedded", "train.device=cpu", "train.steps=1000", "sharding.zero_stage=0",
        "sharding.replicate=1", "sharding.offload=none", "train.compile=false"]  # fmt: skip


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
    """Take steps of every choice of a case, in turn, so that other work slows all of them alike."""
    from bigtrain.training import peak

    peak.CLOCK = time.process_time
    recipe, hardware = _recipe(name), _hardware()
    folder = cache_folder(recipe.data)
    measure_rates = [partial(peak.peak_flops, hardware, precision, folder) for precision in ("fp32", "bf16")]
    for measure in measure_rates:
        measure()
    steppers = [Stepper(_plan(recipe, choice)) for choice in _choices(name, recipe)]
    end = time.process_time() + MEASURED_SECONDS
    for count in range(WARM_UP_STEPS + MOST_STEPS):
        if count >= WARM_UP_STEPS + LEAST_STEPS and time.process_time() > end:
            break
        for stepper in steppers:
            stepper.step()
    for measure in measure_rates:  # again, as each launch does: the best counts, and other work may have been there
        measure()
    rows = [_row(stepper.plan, stepper.seconds[WARM_UP_STEPS:]) for stepper in steppers]
    return _case(name, read_kept(folder / KEPT_FILE), rows)


def predict_case(name: str) -> dict[str, Any]:
    """Return a measured case with its predictions made anew."""
    case, recipe = _read()["cases"][name], _recipe(name)
    with tempfile.TemporaryDirectory() as folder:
        os.environ |= {"BIGTRAIN_CACHE": folder, "OMP_NUM_THREADS": "1"}
        Path(folder, KEPT_FILE).write_text(json.dumps(case["rates"]), encoding="utf-8")
        measured = {_key(row): row["measured_steps"] for row in case["choices"]}
        plans = (_plan(recipe, choice) for choice in _choices(name, recipe))
        return _case(name, case["rates"], [_row(plan, measured[_key(_names(plan))]) for plan in plans])


def _case(name: str, rates: dict[str, Any], rows: list[dict[str, Any]]) -> dict[str, Any]:
    """Return a case; of held-out ones with what `auto` chooses within each budget, and its speed."""
    found = {"held_out": name in HELD_OUT, "rates": rates, "choices": rows}
    if name not in HELD_OUT:
        return {**found, "share_of_the_best": at_budgets(rows)}
    chosen = [_chosen(name, rows, budget) for budget in budgets(rows)]
    return {**found, "chosen": chosen, "share_of_the_best": [each["share_of_the_best"] for each in chosen]}


def _chosen(name: str, rows: list[dict[str, Any]], allocated_bytes: float) -> dict[str, Any]:
    """Return what the planner chooses where tensors may take so many bytes, beside the fastest that was measured.

    The process is said to be so large that the budget, as while measuring, does not bound how many logits are held.
    """
    from bigtrain.planner import price
    from bigtrain.planner.search import search
    from bigtrain.planner.settle import settled

    price.PROCESS_BYTES["cpu"] = 8 * 2**30
    hardware, recipe = _hardware(), _recipe(name)
    budget = int(allocated_bytes) + price.beside_bytes(hardware)
    memory = recipe.memory.model_copy(update={"budget": budget})
    found = search(*settled(recipe.model_copy(update={"memory": memory}), hardware, 1)).choice.as_object()
    row = next(row for row in rows if all(found[key] == row[key] for key in KEYS))
    best = min(
        (row for row in rows if row["allocated_bytes_peak"] <= allocated_bytes), key=lambda row: row["measured_seconds"]
    )
    return {
        "allocated_bytes": int(allocated_bytes),
        "choice": {key: row[key] for key in KEYS},
        "fastest": {key: best[key] for key in KEYS},
        "share_of_the_best": best["measured_seconds"] / row["measured_seconds"],
    }


KEYS = ("micro_batch_size", "recompute", "gradient_release")


def _names(plan: Any) -> dict[str, Any]:
    """Return the keys by which the choices of a case differ."""
    from bigtrain.planner.choice import Choice

    choice = Choice.of(plan.recipe, plan.model.num_hidden_layers, 1).as_object()
    return {key: choice[key] for key in KEYS}


def _key(row: dict[str, Any]) -> str:
    return json.dumps([row["micro_batch_size"], row["recompute"], row.get("gradient_release", False)])


def _choices(name: str, recipe: Any) -> list[Any]:
    """Return the choices of a case: all that the planner has, or of a fitted one some."""
    from bigtrain.planner.candidates import mixes, settings
    from bigtrain.planner.offers import chosen

    blocks, hardware = recipe.model.num_hidden_layers, _hardware()
    space = settings(recipe, hardware, 1)
    if name in HELD_OUT:
        return [chosen(setting, mix) for setting in space for row in mixes(recipe, blocks, hardware) for mix in row]
    some = [setting for setting in space if setting.micro_batch_size in FITTED[name][1]]
    return [chosen(setting, ((policy, blocks),)) for setting, policy in itertools.product(some, POLICIES)]


def _recipe(name: str) -> Any:
    """Return a case's recipe, with `auto` where the choices differ."""
    import bigtrain

    overrides = HELD_OUT[name] if name in HELD_OUT else FITTED[name][0]
    base = "recipes/quickstart_bert.yaml" if "model.family=bert" in overrides else "recipes/quickstart_gpt.yaml"
    return bigtrain.load_recipe(base, [*BASE, *overrides])


def _hardware() -> Any:
    from bigtrain.planner.hardware import cpu

    return cpu()


def _plan(recipe: Any, choice: Any) -> Any:
    import bigtrain

    return bigtrain.plan(choice.into(recipe), _hardware())


class Stepper:
    """An engine and full rows of one document each."""

    def __init__(self, plan: Any) -> None:
        from bigtrain.training.build import build_engine

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
        **_names(plan),
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
    sides: dict[str, list[str]] = {"fitted": [*FITTED], "held out": [*HELD_OUT]}
    parts = {
        side: {key: result["cases"][key] for key in names if key in result["cases"]} for side, names in sides.items()
    }
    result["summary"] = {side: summarize(cases) for side, cases in parts.items() if cases}
    result["shapes"] = {**{key: overrides for key, (overrides, _) in FITTED.items()}, **HELD_OUT}
    result["provenance"] = provenance()
    aside = RESULT.with_suffix(".tmp")
    aside.write_text(json.dumps(result, indent=1) + "\n", encoding="utf-8")
    aside.replace(RESULT)


def _options() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description="Hold predicted seconds of a step against real steps on this CPU.")
    parser.add_argument("--again", nargs="*", default=[], choices=CASES)
    parser.add_argument("--predict", action="store_true", help="predict anew, measure nothing")
    parser.add_argument("--case", choices=CASES, help=argparse.SUPPRESS)
    return parser.parse_args()


if __name__ == "__main__":
    main()
