"""Time training steps of bigtrain beside what a user would take instead, each arm in a process of its own.

    python scripts/bench_against.py --work gpt-small-cpu --output benchmarks/speed/cpu.jsonl
    python scripts/bench_against.py --work bert-large-512 --arms bigtrain hf hf-compile plain --micro-batch best
    python scripts/bench_against.py recipes/quickstart_gpt.yaml data.sequence_length=256 --rows 8 --mode documents

Arms: `bigtrain`, the loop that `bigtrain launch` runs, in its environment; `hf`, transformers' Trainer as it is started
by default; `hf-compile`, the same with SDPA, torch.compile and the fused AdamW; `hf-deepspeed`, the same with a ZeRO
configuration; `plain`, a loop by hand with compile, SDPA and fused AdamW. They run in turn, in an order that moves on
with each round; all start from the same weights and train on the same rows (scripts/arms/rows.py) with the same
optimizer. An arm that cannot run is written down as such, with why.

One line of JSON a round and arm, and a summary at the end, appended to --output. Started again, it goes on: rounds that
the file has of the same job, device and commit are not measured again, nor arms that ran out of memory or time.
"""

from __future__ import annotations

import argparse
import json
import os
import subprocess
import sys
import tempfile
from dataclasses import replace
from datetime import UTC, datetime
from importlib import import_module
from pathlib import Path
from typing import Any

from arms import results
from arms.job import MODES, WARM_UP_STEPS, CannotRun, Job
from arms.works import WORKS
from provenance import provenance

from bigtrain.spawner import die_with_parent

ARMS = {"bigtrain": "ours", "hf": "trainer", "hf-compile": "trainer", "hf-deepspeed": "trainer", "plain": "plain"}
SEARCH_STEPS = 3
LEAST_GAIN = 0.98
"""A larger micro-batch is tried while the last one was at least this fast, against the best so far."""
SETTLED = ("took longer", "out of memory")
"""How reasons begin for which an arm is not tried again: it would take as long once more."""

OUT_OF_MEMORY = ("out of memory", "OutOfMemoryError", "DoesNotFit", "can't allocate memory")

Line = dict[str, Any]


def main() -> None:
    """Run the rounds that are missing, and sum up."""
    options = _options()
    if options.child:
        die_with_parent(options.parent)
        print("RESULT " + json.dumps(run_child(options.child, Job.from_json(options.job))))
        return
    with tempfile.TemporaryDirectory() as folder:
        job = replace(_job(options), folder=folder)
        facts = in_process("facts", job, seconds=options.timeout)
        if "not_run" in facts:
            raise SystemExit(f"nothing was measured: {facts['not_run']}")
        Measurement(options, job, facts).run()


class Measurement:
    """The rounds of one work."""

    def __init__(self, options: argparse.Namespace, job: Job, facts: Line) -> None:
        self._options, self._job, self._facts = options, job, facts
        self._made_by = provenance()
        self._lines = [line for line in results.read(options.output) if self._is_of_this(line)]

    def run(self) -> None:
        """Measure what is missing and append the summary."""
        arms = self._options.arms
        for number in range(1, self._options.rounds + 1):
            turn = (number - 1) % len(arms)
            for arm in arms[turn:] + arms[:turn]:
                if not self._has(arm, number):
                    self._keep(self._measured(arm, number))
        summary = results.summarize(self._lines, arms)
        line = {"summary": summary, **self._about(), "commits": sorted({one["commit"] for one in self._lines})}
        results.append(self._options.output, line)
        print(json.dumps(line, indent=1))

    def _measured(self, arm: str, number: int) -> Line:
        job = replace(self._job, arm=arm)
        search: Line = {}
        if self._options.micro_batch == "best":
            job, search = self._best(job)
        found = search if "not_run" in search else self._in_process(arm, job)
        rates = {} if "not_run" in found else results.rates(found, self._facts)
        sizes = {"micro_batch_size": job.rows, "accumulation_steps": job.accumulation}
        return {"arm": arm, "round": number, **self._about(), **sizes, **search, **found, **rates}

    def _best(self, job: Job) -> tuple[Job, Line]:
        """Return the job with the fastest micro-batch: the one given, doubled until it is slower or does not fit.

        The rows of a step stay, as long as they make whole micro-batches; beyond that they grow. Where the one given
        does not run, what is found says so.
        """
        known = next((line for line in self._lines if line["arm"] == job.arm and "tried" in line), None)
        if known is not None:
            return _with_rows(job, known["micro_batch_size"]), {"tried": known["tried"]}
        tried: dict[int, float] = {}
        rows = job.rows
        while rows <= self._options.most_rows:
            shorter = replace(_with_rows(job, rows), steps=SEARCH_STEPS)
            found = self._in_process(job.arm, shorter)
            if "not_run" in found and not tried:
                return job, {"tried": {}, "not_run": found["not_run"]}
            if "not_run" in found or found["tokens_per_second"] < LEAST_GAIN * max([0.0, *tried.values()]):
                break
            tried[rows] = found["tokens_per_second"]
            rows *= 2
        best = max(tried, key=lambda size: tried[size])
        return _with_rows(job, best), {"tried": tried}

    def _in_process(self, arm: str, job: Job) -> Line:
        return in_process(arm, job, self._facts["hardware"]["kind"], self._options.timeout)

    def _about(self) -> Line:
        options, facts, job = self._options, self._facts, self._job
        named = ("hardware", "precision", "dropout", "attention_dropout", "parameters", "flops_per_token",
                 "attended_length", "same_weights", "peak_flops_per_second", "measured_flops_per_second",
                 "predicted_tokens_per_second", "rates")  # fmt: skip
        return {
            "work": options.work or job.recipe,
            "mode": job.mode,
            "micro_batch": options.micro_batch,
            **{name: facts[name] for name in named},
            "job": self._key(),
            "warm_up_steps": WARM_UP_STEPS,
            "date": datetime.now(UTC).isoformat(timespec="seconds"),
            "load_average": os.getloadavg(),
            **self._made_by,
        }

    def _key(self) -> str:
        return f"{replace(self._job, arm='').key} {self._options.micro_batch}"

    def _is_of_this(self, line: Line) -> bool:
        same_device = line.get("hardware", {}).get("name") == self._facts["hardware"]["name"]
        same = line.get("job") == self._key() and line.get("commit") == self._made_by["commit"] and same_device
        settled = line.get("not_run", SETTLED[0]).startswith(SETTLED)
        return same and "round" in line and settled and not self._options.again

    def _has(self, arm: str, number: int) -> bool:
        """Tell whether a round was measured; an arm that could not run is not tried again in this call."""
        mine = [line for line in self._lines if line["arm"] == arm]
        return any(line["round"] == number or "not_run" in line for line in mine)

    def _keep(self, line: Line) -> None:
        self._lines.append(line)
        results.append(self._options.output, line)
        text = line.get("not_run") or f"{line['tokens_per_second']:,.0f} tokens/s, loss {line['loss_last']:.4f}"
        print(f"round {line['round']} {line['arm']}: {text}", file=sys.stderr, flush=True)


def run_child(arm: str, job: Job) -> Line:
    """Run an arm in this process, or find the facts."""
    module = "facts" if arm == "facts" else ARMS[arm]
    run = getattr(import_module(f"arms.{module}"), "facts" if arm == "facts" else "run")
    try:
        found: Line = run(job)
    except CannotRun as error:
        return {"not_run": str(error)}
    return found


def in_process(arm: str, job: Job, kind: str = "cpu", seconds: float | None = None) -> Line:
    """Run an arm in a process of its own: bigtrain's in the environment of its workers, others in this one's.

    One that is out of memory, ends with a fault or takes too long has not run, which is the result.
    """
    from bigtrain.launcher import worker_environment

    environment = worker_environment(kind) if arm == "bigtrain" else dict(os.environ)
    argv = [sys.executable, __file__, "--child", arm, "--job", job.to_json(), "--parent", str(os.getpid())]
    try:
        ran = subprocess.run(argv, capture_output=True, text=True, check=False, env=environment, timeout=seconds)
    except subprocess.TimeoutExpired:
        return {"not_run": f"took longer than {seconds:.0f} s"}
    lines = [line for line in ran.stdout.splitlines() if line.startswith("RESULT ")]
    if not ran.returncode and lines:
        chosen = [line for line in ran.stdout.splitlines() if line.startswith("attention: ")]
        found: Line = {"attention": chosen[-1].removeprefix("attention: ")} if chosen else {}
        found |= json.loads(lines[-1].removeprefix("RESULT "))
        return found
    if ran.returncode == -9 or any(text in ran.stderr for text in OUT_OF_MEMORY):
        return {"not_run": f"out of memory with micro-batches of {job.rows}"}
    return {"not_run": f"exit {ran.returncode}: {ran.stderr.strip()[-1500:]}"}


def _with_rows(job: Job, rows: int) -> Job:
    return replace(job, rows=rows, accumulation=max(1, job.rows * job.accumulation // rows))


def _job(options: argparse.Namespace) -> Job:
    """Return what is to be measured: a named work or a recipe, with what the command line says of it."""
    said = {name: getattr(options, name) for name in ("mode", "mean_length", "rows", "accumulation")}
    said = {name: value for name, value in said.items() if value is not None}
    common = {"arm": "", "steps": options.steps, "zero_stage": options.zero_stage, **said}
    if options.work is None:
        return Job(recipe=options.recipe, overrides=tuple(options.overrides), **common)
    work, more = WORKS[options.work], [options.recipe] if options.recipe else []
    named = {name: getattr(work, name) for name in ("rows", "accumulation", "mode", "mean_length", "checkpointing")}
    overrides = (*work.overrides, *more, *options.overrides)
    return Job(recipe=work.recipe, overrides=overrides, **{**named, **common})


def _options() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description="Time training steps of bigtrain beside those of other ways to train.")
    parser.add_argument("recipe", nargs="?", help="a recipe; with --work another override")
    parser.add_argument("overrides", nargs="*")
    parser.add_argument("--work", choices=list(WORKS))
    parser.add_argument("--arms", nargs="+", choices=list(ARMS), help="of a work without it: its own")
    parser.add_argument("--mode", choices=MODES, help="where rows are from; of a recipe without it: full")
    parser.add_argument("--mean-length", type=int, help="tokens of a document with --mode documents")
    parser.add_argument("--micro-batch", choices=["equal", "best"], default="equal")
    parser.add_argument("--rows", type=int, help="of a micro-batch; with --micro-batch best the first that is tried")
    parser.add_argument("--accumulation", type=int, help="micro-batches of a step")
    parser.add_argument("--most-rows", type=int, default=1024)
    parser.add_argument("--zero-stage", type=int, choices=[0, 1, 2], default=2, help="of hf-deepspeed")
    parser.add_argument("--steps", type=int, help="timed steps of each arm in each round")
    parser.add_argument("--rounds", type=int, help="of a work without it: its own; 5")
    parser.add_argument("--timeout", type=float, help="seconds that a process may take")
    parser.add_argument("--again", action="store_true", help="measure rounds anew that the file has")
    parser.add_argument("--output", type=Path, help="a file of JSON lines that is added to")
    parser.add_argument("--child", help=argparse.SUPPRESS)
    parser.add_argument("--job", help=argparse.SUPPRESS)
    parser.add_argument("--parent", type=int, default=os.getppid(), help=argparse.SUPPRESS)
    options = parser.parse_intermixed_args()
    if options.work is None and options.recipe is None and options.child is None:
        parser.error("give --work or a recipe")
    work = WORKS.get(options.work)
    options.arms = options.arms or list(work.arms if work else ("bigtrain", "hf"))
    options.rounds = options.rounds or (work.rounds if work else 5)
    options.steps = options.steps or (work.steps if work else 15)
    return options


if __name__ == "__main__":
    main()
