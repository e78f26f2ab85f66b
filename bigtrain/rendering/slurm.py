"""A batch file for Slurm: one launcher on each machine, which starts its devices and meets the others."""

from __future__ import annotations

import shlex
import sys
from pathlib import Path

from bigtrain.errors import Interrupted
from bigtrain.rendering.job import SIGNAL_SECONDS, Command, Job
from bigtrain.rendering.lines import comments

LEAST_PORT, PORTS = 20_000, 10_000
"""Below the ports that Linux gives to outgoing connections (32768 to 60999, ip(7))."""

WHOLE = ["# Whole machines: without these a launcher gets one core, and memory for one.", "--exclusive", "--mem=0"]


def slurm_file(job: Job, command: Command, *, python: str = sys.executable, folder: str | None = None) -> str:
    """Return a file for sbatch that runs the command in this folder with this interpreter, both on every machine.

    After the signal before the time limit, and a checkpoint, the job goes back into the queue and goes on from there.
    """
    name = job.recipe.name
    head = [
        f"{name} on Slurm: {job.shape}. Printed by: {command} --render slurm",
        "Start: sbatch FILE; further options, such as --account, on its command line.",
        job.note,
    ]
    run_dir = command.run_dir or Path("runs") / name
    started = [_step(job), shlex.join([python, "-P", "-m", "bigtrain", "launch", command.recipe])]
    overrides = [*map(shlex.quote, (*command.overrides, *job.settled)), *_meeting(job)]
    text = [
        "#!/usr/bin/env bash",
        *comments(*head),
        *_directives(job),
        "",
        "set -euo pipefail",
        f"cd -- {shlex.quote(folder or str(Path.cwd()))}",
        *_rendezvous(job),
        "",
        "code=0",
        " \\\n    ".join([*started, *overrides, shlex.join(command.options(run_dir))]) + " || code=$?",
        "",
        f'if [ "$code" -eq {Interrupted.exit_code} ]; then',
        '    scontrol requeue "$SLURM_JOB_ID"  # stopped after a checkpoint: go on from it',
        "fi",
        'exit "$code"',
    ]
    return "\n".join(text) + "\n"


def _directives(job: Job) -> list[str]:
    cluster = job.recipe.cluster
    nodes = f"{job.least}-{job.most}" if job.elastic else str(job.most)
    options = [f"--job-name={job.recipe.name}", f"--nodes={nodes}", "--ntasks-per-node=1"]
    options += [f"--gpus-per-node={job.devices}"] if job.cuda else []
    options += WHOLE
    options += [f"--partition={cluster.partition}"] if cluster.partition else []
    options += [f"--time={slurm_time(cluster.time_limit)}"] if cluster.time_limit else []
    options += ["--output=slurm-%x-%j.out", "--open-mode=append", "--requeue", f"--signal=USR1@{SIGNAL_SECONDS}"]
    # The job outlives a machine that fails, and its launchers go on with the others.
    options += ["--no-kill"] if job.elastic else []
    return [option if option.startswith("#") else f"#SBATCH {option}" for option in options]


def slurm_time(seconds: float) -> str:
    """Return a time as sbatch(1) reads it: days-hours:minutes:seconds."""
    minutes, second = divmod(round(seconds), 60)
    hours, minute = divmod(minutes, 60)
    day, hour = divmod(hours, 24)
    return f"{day}-{hour:02}:{minute:02}:{second:02}"


def _rendezvous(job: Job) -> list[str]:
    if job.alone:
        return []
    return [
        "",
        "# The launchers meet on the first machine, at a port of this job's own.",
        'mapfile -t hosts < <(scontrol show hostnames "$SLURM_JOB_NODELIST")',
        f"rendezvous=${{hosts[0]}}:$(({LEAST_PORT} + SLURM_JOB_ID % {PORTS}))",
    ]


def _meeting(job: Job) -> list[str]:
    return [] if job.alone else ['cluster.rendezvous="$rendezvous"']


def _step(job: Job) -> str:
    # Launchers stop each other after a checkpoint: the first to end must not take the others with it.
    options = ["--kill-on-bad-exit=0", "--cpu-bind=none"] + (["--no-kill"] if job.elastic else [])
    return " ".join(["srun", *options])
