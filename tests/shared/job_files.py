"""Job files of some recipes, as no machine differs in them; run as a script, it writes tests/rendering/golden again."""

from __future__ import annotations

import dataclasses
from pathlib import Path

from bigtrain.config.dump import to_yaml
from bigtrain.config.load import read_recipe
from bigtrain.config.schema import Recipe
from bigtrain.config.shipped import recipe_path
from bigtrain.rendering.job import Command, Job, job_of
from bigtrain.rendering.kubernetes import kubernetes_file
from bigtrain.rendering.lines import block
from bigtrain.rendering.slurm import slurm_file
from bigtrain.rendering.trainjob import trainjob_file

GOLDEN = Path(__file__).parent.parent / "rendering" / "golden"

SOURCE = "quickstart_gpt"
NOTE = "Here it says what is predicted."
POD_KEYS = ("cluster.image=registry.example/bigtrain:0.1", "cluster.volume=runs")
GPUS = ("cluster.devices_per_node=2", "train.device=cuda", "train.global_batch_size=48")

CASES: dict[str, tuple[str, tuple[str, ...]]] = {
    "slurm_one.sh": ("slurm", ("train.device=cpu",)),
    "slurm_many.sh": ("slurm", ("cluster.nodes=2", "cluster.partition=gpu", "cluster.time_limit=36h", *GPUS)),
    "slurm_elastic.sh": ("slurm", ("cluster.nodes=2:4", *GPUS, "data.cache=/a b/$HOME")),
    "kubernetes_one.yaml": ("kubernetes", ("train.device=cpu", *POD_KEYS)),
    "kubernetes_many.yaml": ("kubernetes", ("cluster.nodes=2", "cluster.time_limit=36h", *GPUS, *POD_KEYS)),
    "kubernetes_elastic.yaml": ("kubernetes", ("cluster.nodes=2:4", *GPUS, *POD_KEYS)),
    "trainjob_one.yaml": ("trainjob", ("train.device=cpu", *POD_KEYS)),
    "trainjob_many.yaml": ("trainjob", ("cluster.nodes=2", "cluster.time_limit=36h", *GPUS, *POD_KEYS)),
}


def recipe(*overrides: str) -> Recipe:
    """Return the quickstart with overrides; what does not fit together in it, or is not built yet, is let through."""
    return read_recipe(recipe_path(SOURCE).read_bytes(), SOURCE, overrides, name=SOURCE)


def job(scheduler: str, *overrides: str) -> Job:
    """Return a job of the quickstart; for GPUs it is planned for a T4."""
    loaded = recipe(*overrides)
    found = job_of(scheduler, loaded, None if loaded.train.device == "cpu" else "t4")
    return dataclasses.replace(found, note=NOTE)


def printed(case: str) -> str:
    """Return a case's whole file."""
    scheduler, overrides = CASES[case]
    command = Command(SOURCE, overrides)
    found = job(scheduler, *overrides)
    if scheduler == "slurm":
        return slurm_file(found, command, python="/opt/bigtrain/bin/python", folder="/home/me/my runs")
    return {"kubernetes": kubernetes_file, "trainjob": trainjob_file}[scheduler](found, command)


def shortened(text: str) -> str:
    """Return a file without its recipe, which tests of the recipe's text hold."""
    before, marker, after = text.partition("  recipe.yaml: |\n")
    return before + marker + "    ...\n---\n" + after.partition("\n---\n")[2] if marker else text


def embedded(found: Job) -> str:
    """Return a job's recipe as it stands in a ConfigMap."""
    return block(to_yaml(found.recipe), 4)


if __name__ == "__main__":
    for name in CASES:
        (GOLDEN / name).write_text(shortened(printed(name)), encoding="utf-8")
