"""What a job file is made of: a recipe checked for its scheduler, how many machines, and what was typed."""

from __future__ import annotations

import shlex
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Literal

from bigtrain.config.schema import Recipe
from bigtrain.config.shape_checks import fault
from bigtrain.errors import Fault, RecipeError
from bigtrain.planner import hardware as hardware_module
from bigtrain.planner.hardware import Hardware
from bigtrain.planner.plan import plan
from bigtrain.planner.settle import named_hardware
from bigtrain.planner.words import short_choice
from bigtrain.rendering.names import name_faults
from bigtrain.units import exact_seconds, format_bytes

Scheduler = Literal["slurm", "kubernetes", "trainjob"]

SCHEDULERS: dict[Scheduler, str] = {"slurm": "slurm", "kubernetes": "kubernetes", "trainjob": "kubernetes"}
"""What a file can be rendered for, and the `cluster.scheduler` that it belongs to."""

POD_SUFFIXES = {"kubernetes": "-{}", "trainjob": "-node-0-{}"}
"""What follows the run's name in the host name of a pod, with the number of its machine."""

NOT_PLANNED = "Not planned: no GPU here. Whether it fits is known when the job starts, or now with --device NAME."

SIGNAL_SECONDS = 120
"""How long before the time limit Slurm asks the run to save. It may do so up to 60 seconds earlier (sbatch(1))."""

SAVING_SECONDS = 600
"""What processes have from the signal to stop until they are killed, where that is ours to say: as in the launcher."""


@dataclass(frozen=True)
class Command:
    """What was typed after `bigtrain launch`; `allowed` are the keys after --allow."""

    recipe: str
    overrides: tuple[str, ...] = ()
    run_dir: Path | None = None
    allowed: tuple[str, ...] = ()

    def options(self, run_dir: Path) -> list[str]:
        """Return the options of the same launch into a folder."""
        return ["--run-dir", str(run_dir), *(word for key in self.allowed for word in ("--allow", key))]

    def __str__(self) -> str:
        """Return the command in one line, without --render."""
        options = [] if self.run_dir is None else self.options(self.run_dir)
        return shlex.join(["bigtrain", "launch", self.recipe, *self.overrides, *options])


@dataclass(frozen=True)
class Job:
    """A run as a scheduler places it: from `least` to `most` machines, each with so many devices.

    `recipe` is what its processes are to read: the kind and the number of devices written out, the scheduler `local`,
    since by then they are placed. `settled` are overrides that make it of the recipe that was typed. `note` says
    what is predicted.
    """

    recipe: Recipe
    settled: tuple[str, ...]
    least: int
    most: int
    devices: int
    note: str

    @property
    def cuda(self) -> bool:
        """Tell whether the machines are to have GPUs."""
        return self.recipe.train.device == "cuda"

    @property
    def elastic(self) -> bool:
        """Tell whether machines may come and go."""
        return self.least != self.most

    @property
    def alone(self) -> bool:
        """Tell whether there is one machine, so that nobody has to be met."""
        return self.most == 1

    @property
    def shape(self) -> str:
        """Return the machines and their devices in words: `2 to 4 machines x 8 GPUs`."""
        count = f"{self.least} to {self.most}" if self.elastic else str(self.most)
        devices = f"{self.devices} {'GPU' if self.cuda else 'process'}"
        plural = "" if self.devices == 1 else "s" if self.cuda else "es"
        return f"{count} machine{'' if self.alone else 's'} x {devices}{plural}"


def job_of(scheduler: Scheduler, recipe: Recipe, device: str | None = None) -> Job:
    """Return the job that runs a recipe, planned for a device of the planner's table or one that is here.

    Raises RecipeError with a fault for each key that is missing or contradicts the scheduler, InputError for a device
    that is not known, DoesNotFit where the recipe does not fit it.
    """
    hardware = _hardware(recipe, device)
    kind: Literal["cpu", "cuda"] = "cuda" if hardware is None else hardware.kind
    cluster = recipe.cluster
    least, _, most = str(cluster.nodes).partition(":")
    faults = [*_contradictions(scheduler, recipe), *_missing(scheduler, recipe, kind)]
    if scheduler in POD_SUFFIXES:
        faults += name_faults(recipe, POD_SUFFIXES[scheduler].format(int(most or least) - 1))
    if faults:
        raise RecipeError(*faults)
    settled = [f"train.device={kind}"] if recipe.train.device == "auto" else []
    settled += ["cluster.scheduler=local"] if cluster.scheduler != "local" else []
    devices = 1 if cluster.devices_per_node == "auto" else cluster.devices_per_node
    sections = {
        "train": recipe.train.model_copy(update={"device": kind}),
        "cluster": cluster.model_copy(update={"devices_per_node": devices, "scheduler": "local"}),
    }
    placed = recipe.model_copy(update=sections)
    note = NOT_PLANNED if hardware is None else _predicted(placed, hardware)
    return Job(placed, tuple(settled), int(least), int(most or least), devices, note)


def check_local(recipe: Recipe) -> None:
    """Raise RecipeError if a recipe that is to run here and now names a scheduler: its job file comes first."""
    scheduler = recipe.cluster.scheduler
    if scheduler != "local":
        text = f"{scheduler!r}: bigtrain prints the job file and leaves it to you to submit"
        text += f"; add --render {scheduler}, or write local where the processes are placed already"
        raise RecipeError(fault(recipe, "cluster.scheduler", text))


def _hardware(recipe: Recipe, device: str | None) -> Hardware | None:
    """Return what to plan for; None for GPUs that are not here."""
    if device is not None:
        return named_hardware(recipe, device)
    if recipe.train.device == "cpu":
        return hardware_module.cpu()
    return hardware_module.cuda_devices()


def _contradictions(scheduler: Scheduler, recipe: Recipe) -> Iterator[Fault]:
    written = recipe.cluster.scheduler
    if written not in ("local", SCHEDULERS[scheduler]):
        text = f"{written!r} contradicts --render {scheduler}; write {SCHEDULERS[scheduler]} or local"
        yield fault(recipe, "cluster.scheduler", text)
    if recipe.cluster.rendezvous is not None:
        text = f"{recipe.cluster.rendezvous!r}: the job file names the first of the machines that it gets; use null"
        yield fault(recipe, "cluster.rendezvous", text)
    limit = recipe.cluster.time_limit
    if scheduler == "slurm" and limit is not None and limit <= SIGNAL_SECONDS + 60:
        text = f"{exact_seconds(limit)}: Slurm asks a run to save {SIGNAL_SECONDS} to {SIGNAL_SECONDS + 60} s before it"
        yield fault(recipe, "cluster.time_limit", f"{text}; write more, such as 1h")
    if scheduler == "trainjob" and isinstance(recipe.cluster.nodes, str):
        text = f"{recipe.cluster.nodes!r}: a TrainJob keeps its number of nodes; write one, or use --render kubernetes"
        yield fault(recipe, "cluster.nodes", text)


def _missing(scheduler: Scheduler, recipe: Recipe, kind: Literal["cpu", "cuda"]) -> Iterator[Fault]:
    cluster = recipe.cluster
    if kind == "cuda" and cluster.devices_per_node == "auto":
        text = "auto: a job file asks for a number of GPUs; write how many a machine has, or train.device=cpu"
        yield fault(recipe, "cluster.devices_per_node", text)
    if scheduler == "slurm":
        return
    if cluster.image is None:
        text = f"missing: --render {scheduler} needs the container image that has bigtrain; write registry/name:tag"
        yield fault(recipe, "cluster.image", text)
    if cluster.volume is None:
        text = f"missing: --render {scheduler} needs a PersistentVolumeClaim for the run folder; write its name"
        yield fault(recipe, "cluster.volume", text)


def _predicted(recipe: Recipe, hardware: Hardware) -> str:
    planned = plan(recipe, hardware)
    peak, budget = planned.memory.device_bytes_peak, planned.budget_bytes
    count = f"{planned.world_size:,} x " if planned.world_size > 1 else ""
    size = "" if peak is None else f"{format_bytes(peak)} of {format_bytes(budget)} a device at the peak, "
    return f"Predicted for {count}{hardware.name}: {size}{short_choice(planned.choice)}."
