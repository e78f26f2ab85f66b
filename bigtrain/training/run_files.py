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
from bigtrain import strict_json
from bigtrain.checkpoint.resume import PLAN_FILE
from bigtrain.data.cache import write_json, written_aside
from bigtrain.planner.plan import Plan

DEPENDENCIES = ("torch", "numpy", "tokenizers")
"""Whose versions a result depends on."""

ENVIRONMENT_FILE = "env.json"

PLACES = ("python", "device", "ranks", "threads")
"""What else of an environment its last bits depend on."""


def write_run_files(folder: Path, plan: Plan) -> None:
    """Write plan.yaml and env.json; a folder that is in their place is moved aside, to `bad-NAME`."""
    for name in (PLAN_FILE, ENVIRONMENT_FILE):
        _clear(folder / name)
    with written_aside(folder / PLAN_FILE) as file:
        file.write(plan.to_yaml().encode())
    write_json(folder / ENVIRONMENT_FILE, environment(plan))


def _clear(path: Path) -> None:
    """Move away what cannot be replaced by a file."""
    if path.is_dir() and not path.is_symlink():
        taken = {other.name for other in path.parent.glob(f"bad-{path.name}*")}
        names = (f"bad-{path.name}{f'-{number}' if number else ''}" for number in range(len(taken) + 1))
        path.rename(path.with_name(next(name for name in names if name not in taken)))


def changes_since(folder: Path, plan: Plan) -> str:
    """Return what is another now than at the last start of a run, of what its last bits depend on; "" for nothing.

    Nothing either where the file that tells it is gone or damaged.
    """
    try:
        before = strict_json.read(folder / ENVIRONMENT_FILE)
    except (OSError, ValueError):
        return ""
    then, now = (_facts(found) for found in (before, environment(plan)))
    changed = [f"{name} {now[name]} (was {then[name]})" for name in now if then.get(name, now[name]) != now[name]]
    return ", ".join(changed)


def _facts(found: Any) -> dict[str, str]:
    """Return what bits depend on of an environment, by name, each as a short text."""
    if not isinstance(found, dict):
        return {}
    versions = found.get("versions")
    facts = {**(versions if isinstance(versions, dict) else {}), **{name: found.get(name) for name in PLACES}}
    return {name: str(value)[:60] for name, value in facts.items() if isinstance(value, (str, int))}


def environment(plan: Plan) -> dict[str, Any]:
    """Return what a result depends on besides the recipe: versions, device, command, revision."""
    return {
        "python": platform.python_version(),
        "versions": versions(),
        "device": plan.hardware.name,
        "ranks": plan.world_size,
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
