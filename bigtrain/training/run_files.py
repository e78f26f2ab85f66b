"""What a run folder says of the run besides its metrics: plan.yaml and env.json."""

from __future__ import annotations

import platform
import shutil
import subprocess
import sys
from importlib import metadata
from pathlib import Path
from typing import Any

import torch

import bigtrain
from bigtrain.checkpoint.resume import PLAN_FILE
from bigtrain.data.cache import write_json, written_aside
from bigtrain.planner.plan import Plan

DEPENDENCIES = ("torch", "numpy", "tokenizers")
"""Whose versions a result depends on."""


def write_run_files(folder: Path, plan: Plan) -> None:
    """Write plan.yaml and env.json."""
    with written_aside(folder / PLAN_FILE) as file:
        file.write(plan.to_yaml().encode())
    write_json(folder / "env.json", environment(plan))


def environment(plan: Plan) -> dict[str, Any]:
    """Return what a result depends on besides the recipe: versions, device, command, revision."""
    return {
        "python": platform.python_version(),
        "versions": versions(),
        "device": plan.hardware.name,
        "threads": torch.get_num_threads(),
        "command": sys.argv,
        "git_revision": git_revision(),
    }


def git_revision() -> str | None:
    """Return the revision of the checkout that bigtrain runs from; None for an installed package, or without git."""
    checkout = Path(__file__).parents[2]
    if not (checkout / ".git").exists() or shutil.which("git") is None:
        return None
    found = subprocess.run(["git", "rev-parse", "HEAD"], capture_output=True, text=True, cwd=checkout, check=False)
    return found.stdout.strip() or None


def versions() -> dict[str, str]:
    """Return the versions that a result depends on."""
    return {"bigtrain": bigtrain.__version__, **{name: metadata.version(name) for name in DEPENDENCIES}}
