"""Time a recipe's own step in the loop that `bigtrain launch` runs, what of it is no computation, and its loader alone.

    python scripts/bench_step.py recipes/quickstart_gpt.yaml model.hidden_size=384 --rounds 5 --output FILE
    python scripts/bench_step.py --work gpt-small-cpu --output FILE

The recipe's batch, schedule, logging and data as they are; no evaluation and no checkpoint falls into the timed steps.
`outside_share` is the share of a step's time outside of forward, backward and optimizer, by the host's clock: loader,
metrics, Python. Then the loader is read alone: tokens for each second on a core, and how often that is the training's
rate. Each round is a process of its own, in the environment of bigtrain's workers. One line of JSON a round and a
summary, appended to --output. scripts/bench_against.py measures others beside it.
"""

from __future__ import annotations

import argparse
import json
import os
import statistics
import subprocess
import sys
from dataclasses import replace
from pathlib import Path
from typing import Any

from arms import results
from arms.facts import machine
from arms.job import MODES, Job
from arms.ours import train
from arms.works import WORKS
from provenance import provenance

from bigtrain.spawner import die_with_parent

UNTIMED = ["train.eval_every=null", "checkpoint.every_steps=null", "checkpoint.every_minutes=null"]
ENDLESS = ["train.tokens=null", "train.epochs=null", "train.steps=1000000"]
MEDIANS = ("tokens_per_second", "seconds_per_step", "host_bytes_peak", "outside_share", "loader_tokens_per_core_second",
           "loader_ratio")  # fmt: skip

Line = dict[str, Any]


def main() -> None:
    """Run the rounds, and sum up."""
    options = _options()
    if options.child:
        die_with_parent(options.parent)
        print("RESULT " + json.dumps(run(Job.from_json(options.child), _plan(options))))
        return
    about = {"work": options.work or options.recipe, "overrides": options.overrides, "mode": options.mode}
    lines: list[Line] = []
    for number in range(1, options.rounds + 1):
        lines.append({"arm": "bigtrain", "round": number, **about, **_in_process(options), **provenance()})
        results.append(options.output, lines[-1])
        print(f"round {number}: {lines[-1]['tokens_per_second']:,.0f} tokens/s", file=sys.stderr, flush=True)
    summary = {"summary": summarize(lines), **about, "hardware": lines[-1]["hardware"], **provenance()}
    results.append(options.output, summary)
    print(json.dumps(summary, indent=1))


def summarize(lines: list[Line]) -> Line:
    """Return medians over rounds, of what was measured."""
    found: Line = {"rounds": len(lines)}
    for name in MEDIANS:
        values = [line[name] for line in lines if line[name] is not None]
        found[name] = statistics.median(values) if values else None
    return found


def run(job: Job, plan: Any) -> Line:
    """Train in this process, then read the loader alone."""
    found = train(plan, job)
    alone = loader_rate(plan) if job.mode == "loader" else None
    return {
        "hardware": machine(plan),
        "precision": plan.recipe.amp.precision,
        "dropout": plan.recipe.train.dropout,
        "attention_dropout": plan.recipe.train.attention_dropout,
        "micro_batch_size": plan.micro_batch_size,
        "accumulation_steps": plan.accumulation_steps,
        **found,
        "model_flops_per_second": plan.flops_per_token * found["tokens_per_second"],
        "loader_tokens_per_core_second": alone,
        "loader_ratio": alone / found["tokens_per_second"] if alone else None,
    }


def loader_rate(plan: Any) -> float:
    """Return the tokens that the recipe's loader gives for each second on a core."""
    from bench_data import core_rate

    from bigtrain.data.ensure import ensure_prepared
    from bigtrain.training.build import build_loader

    loader = build_loader(plan, ensure_prepared(plan.recipe, aside=True))
    try:
        return core_rate(loader, seconds=1.0)
    finally:
        loader.close()


def _plan(options: argparse.Namespace) -> Any:
    import bigtrain

    recipe, keys, work = options.recipe, options.overrides, WORKS.get(options.work)
    if work is not None:
        batch = [f"train.micro_batch_size={work.rows}", f"train.global_batch_size={work.rows * work.accumulation}"]
        recipe, keys = work.recipe, [*work.overrides, *batch, *([recipe] if recipe else []), *keys]
    return bigtrain.plan(bigtrain.load_recipe(recipe, [*ENDLESS, *UNTIMED, *keys]))


def _in_process(options: argparse.Namespace) -> Line:
    from bigtrain.launcher import worker_environment

    job = replace(Job("bigtrain", "", (), mode=options.mode), steps=options.steps)
    work = ["--work", options.work] if options.work else []
    recipe = [options.recipe] if options.recipe else []
    argv = [sys.executable, __file__, *recipe, *options.overrides, *work, "--child", job.to_json()]
    argv += ["--parent", str(os.getpid())]
    environment = worker_environment("cuda" if _has_cuda() else "cpu")
    ran = subprocess.run(argv, capture_output=True, text=True, check=False, env=environment)
    lines = [line for line in ran.stdout.splitlines() if line.startswith("RESULT ")]
    if ran.returncode or not lines:
        raise SystemExit(f"exit {ran.returncode}\n{ran.stderr[-3000:]}")
    found: Line = json.loads(lines[-1].removeprefix("RESULT "))
    return found


def _has_cuda() -> bool:
    from bigtrain.planner.hardware import this_machine

    return this_machine().kind == "cuda"


def _options() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0] if __doc__ else "")
    parser.add_argument("recipe", nargs="?", help="a recipe; with --work an override")
    parser.add_argument("overrides", nargs="*")
    parser.add_argument("--work", choices=list(WORKS), help="a named shape in place of a recipe")
    parser.add_argument("--mode", choices=MODES, default="loader", help="where rows are from")
    parser.add_argument("--steps", type=int, default=15, help="timed steps of each round")
    parser.add_argument("--rounds", type=int, default=5)
    parser.add_argument("--output", type=Path, help="a file of JSON lines that is added to")
    parser.add_argument("--child", help=argparse.SUPPRESS)
    parser.add_argument("--parent", type=int, default=os.getppid(), help=argparse.SUPPRESS)
    options = parser.parse_intermixed_args()
    if options.work is None and options.recipe is None:
        parser.error("give a recipe or --work")
    return options


if __name__ == "__main__":
    main()
