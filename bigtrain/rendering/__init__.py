"""Job files: the same recipe as a scheduler wants it, printed and never submitted. No torch."""

from __future__ import annotations

from bigtrain.config.schema import Recipe
from bigtrain.rendering.job import Command, Scheduler, check_local, job_of
from bigtrain.rendering.kubernetes import kubernetes_file
from bigtrain.rendering.slurm import slurm_file
from bigtrain.rendering.trainjob import trainjob_file

__all__ = ["Command", "Scheduler", "check_local", "job_file"]

WRITERS = {"slurm": slurm_file, "kubernetes": kubernetes_file, "trainjob": trainjob_file}


def job_file(scheduler: Scheduler, recipe: Recipe, command: Command, *, device: str | None = None) -> str:
    """Return the job file that runs a recipe under a scheduler.

    `command` is what was typed, `device` a name of the planner's table. The run is planned for that device, or for
    those of this machine if they are of the recipe's kind; a file for GPUs that is made where there are none says that
    it was not. Raises RecipeError where the recipe lacks what the file needs, DoesNotFit where the plan does.
    """
    return WRITERS[scheduler](job_of(scheduler, recipe, device), command)
