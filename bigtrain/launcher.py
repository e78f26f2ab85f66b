"""From a plan to running processes: everything is checked and the data prepared before one starts. No torch here."""

from __future__ import annotations

import json
import os
import sys
from collections.abc import Sequence
from contextlib import ExitStack, suppress
from pathlib import Path

from bigtrain import slurm
from bigtrain.checkpoint import manifest
from bigtrain.checkpoint.lock import check_unused
from bigtrain.checkpoint.resume import as_chosen_before, check_resume, earlier_recipe, stored_recipe
from bigtrain.config.checks import node_counts
from bigtrain.config.dump import to_yaml
from bigtrain.config.initial_shape import PLAN_FILE, shaped_as
from bigtrain.config.paths import local_path
from bigtrain.config.schema import ModelSection, Recipe
from bigtrain.config.shape_checks import fault
from bigtrain.config.trackers import check_trackers
from bigtrain.data.ensure import child_environment, ensure_prepared
from bigtrain.data.packing import check_rows
from bigtrain.data.vocabulary import TRAIN, vocabulary_size
from bigtrain.errors import DoesNotFit, Fault, InputError, RecipeError
from bigtrain.memory.predict import torch_threads
from bigtrain.one_node import keep_running
from bigtrain.planner.plan import Plan, plan
from bigtrain.planner.settle import chosen_hardware
from bigtrain.rendezvous import rendezvous, run_id
from bigtrain.restarts import stoppable
from bigtrain.spawner import Workers
from bigtrain.stops import Stops
from bigtrain.world import World, check_told, world_of

MMAP_THRESHOLD = "MALLOC_MMAP_THRESHOLD_"
"""glibc's name (mallopt(3)) for the size from which memory is mapped alone; once set, it no longer grows by itself."""

TRIM_THRESHOLD = "MALLOC_TRIM_THRESHOLD_"
"""Its name for the bytes at the heap's end from which they are given back; a fixed threshold above fixes it too."""

HUGE_PAGES = "THP_MEM_ALLOC_ENABLE"
"""torch's name for asking huge pages for its tensors: a tenth of a step or more on two cores (docs/decisions.md)."""

REPEATABLE = "MKL_CBWR"
"""MKL's name for the same bits from run to run, which it else does not promise (docs/decisions.md)."""

ALLOCATOR = "PYTORCH_ALLOC_CONF"
"""torch's settings of its caching allocator; the plan's prediction goes by these."""

THREADS = "OMP_NUM_THREADS"
"""How many threads torch computes with."""


def launch(
    plan: Plan, run_dir: str | os.PathLike[str], *, allowed: Sequence[str] = (), written: Recipe | None = None
) -> int:
    """Train as a plan says, in a process for each device of this machine, and return their exit code.

    Where another launcher has started this process as one of its ranks, that is the only one here. Launching the same
    plan into the same folder again goes on from its newest checkpoint. `allowed` are recipe keys that may differ from
    those the run was started with. Of several nodes each launches the same; they are to agree in `written`, the recipe
    before it was planned, and all follow the plan of the first. Raises InputError before anything is started.
    """
    check_devices(plan)
    check_trackers(plan.recipe)
    several = started_ranks(plan.recipe) is None and node_counts(plan.recipe.cluster.nodes)[-1] > 1
    if several:
        check_meeting(plan.recipe)
    folder = Path(run_dir)
    with stoppable(folder) as stops:
        return _launch(plan, folder, allowed, written or plan.recipe, stops, several=several)


def _launch(plan: Plan, folder: Path, allowed: Sequence[str], written: Recipe, stops: Stops, *, several: bool) -> int:
    if not several and started_ranks(plan.recipe) is None:  # else the first rank itself may have it by now
        check_unused(folder)
    check_resume(folder, plan.recipe, allowed)
    if not manifest.step_folders(folder):  # a run that has a checkpoint of its own starts from that
        check_init_from(plan)
    plan.with_rows(check_rows(plan.recipe, ensure_prepared(plan.recipe)))
    argv = ["bigtrain.training", str(os.getpid()), str(folder), ",".join(allowed), *sys.argv]
    if several:
        return _with_other_nodes(plan, folder, argv, written)
    if started_ranks(plan.recipe) is not None:  # who has started the other ranks starts them again, or not
        return Workers(python(*argv), plan.to_yaml(), worker_environment(plan.hardware.kind), 1).run()
    environment = worker_environment(plan.hardware.kind, plan.world_size)
    command, timeout_seconds = python(*argv), plan.recipe.cluster.timeout
    return keep_running(
        lambda: Workers(command, plan.to_yaml(), environment, plan.world_size, timeout_seconds=timeout_seconds),
        folder,
        stops,
    )


def _with_other_nodes(plan: Plan, folder: Path, argv: Sequence[str], written: Recipe) -> int:
    """Meet the launchers of the other nodes, and let an agent train with them in processes of that command."""
    cluster = plan.recipe.cluster
    place, devices = cluster.rendezvous, cluster.devices_per_node
    assert place is not None and devices != "auto"
    run = run_id(plan.recipe.name, folder.name)
    with ExitStack() as held:
        try:
            met = held.enter_context(rendezvous(place, run, timeout_seconds=cluster.timeout))
        except InputError as error:
            raise RecipeError(fault(plan.recipe, "cluster.rendezvous", str(error))) from None
        listener = None if met.listener is None else met.listener.fileno()
        task = {
            "run": run,
            "run_dir": str(folder),
            "nodes": node_counts(cluster.nodes),
            "devices": devices,
            "timeout_seconds": cluster.timeout,
            "place": [place, met.address, met.port, met.own_address, met.interface, listener],
            "plan": plan.to_yaml(),
            "recipe": to_yaml(written),
            "argv": argv,
        }
        environment = worker_environment(plan.hardware.kind, devices)
        agent = python("bigtrain.agent", str(os.getpid()))
        return Workers(agent, json.dumps(task), environment, 1, [] if listener is None else [listener]).run()


def check_meeting(recipe: Recipe) -> None:
    """Raise RecipeError if a recipe for several nodes does not say where they meet."""
    if recipe.cluster.rendezvous is None:
        text = f"missing: {recipe.cluster.nodes} nodes need a place to meet; write the name of one and a free port"
        raise RecipeError(fault(recipe, "cluster.rendezvous", f"{text}, such as node1:29400", "cluster.nodes"))


def started_ranks(recipe: Recipe) -> World | None:
    """Return this process's place among ranks that another launcher has started; None where it is to start them.

    With `cluster.rendezvous` a task of Slurm's is the launcher of its node. Raises RecipeError if a node has several,
    and InputError where another launcher has started several processes and told none its rank.
    """
    world = world_of(os.environ)
    if world is None and recipe.cluster.rendezvous is None:
        check_told(os.environ)
    if world is None or "RANK" in os.environ or recipe.cluster.rendezvous is None:
        return world
    if world.local_size > 1:
        text = f"{recipe.cluster.rendezvous} is where one launcher of each node meets the others, and Slurm has started"
        use = "use null, or srun --ntasks-per-node=1"
        raise RecipeError(fault(recipe, "cluster.rendezvous", f"{text} {world.local_size} tasks here; {use}"))
    return None


def python(*argv: str) -> list[str]:
    """Return a command that runs a module of this very package."""
    return [sys.executable, "-P", "-m", *argv]


def profile_ranks(plan: Plan, *, of_time: bool, as_json: bool, html: Path | None, png: Path | None) -> int:
    """Profile a plan of several ranks in a process for each, and return their exit code; the first shows its own."""
    check_devices(plan)
    if started_ranks(plan.recipe) is None and plan.recipe.cluster.nodes != 1:
        text = f"{plan.recipe.cluster.nodes}: a profile runs on this machine alone; use 1"
        raise RecipeError(fault(plan.recipe, "cluster.nodes", text))
    plan.with_rows(check_rows(plan.recipe, ensure_prepared(plan.recipe, aside=True)))
    options = {"of_time": of_time, "as_json": as_json, "html": html and str(html), "png": png and str(png)}
    argv = python("bigtrain.profiling", str(os.getpid()), json.dumps(options))
    count = plan.world_size if started_ranks(plan.recipe) is None else 1
    return Workers(argv, plan.to_yaml(), worker_environment(plan.hardware.kind, count), count).run()


def check_devices(plan: Plan) -> None:
    """Raise RecipeError if a plan is for more GPUs in a machine than this one has; a CPU runs any number of ranks."""
    wanted, there = plan.recipe.cluster.devices_per_node, plan.hardware.devices
    if plan.hardware.kind != "cuda" or wanted == "auto":
        return
    world = started_ranks(plan.recipe)
    if world is not None and slurm.places(os.environ):
        _check_tasks(plan.recipe, world.local_size, there)
    elif wanted > there:
        text = f"{wanted} processes, but this machine has {there} CUDA device{'s' if there > 1 else ''}"
        raise RecipeError(fault(plan.recipe, "cluster.devices_per_node", f"{text}; use {there}, or auto"))


def _check_tasks(recipe: Recipe, tasks: int, devices: int) -> None:
    """Raise RecipeError unless Slurm has started a task for each GPU; it may show each its own alone."""
    if devices not in (1, tasks):
        text = f"Slurm has started {tasks} task{'s' if tasks > 1 else ''} on this node, which has {devices} GPUs"
        use = f"use srun --ntasks-per-node={devices}, or cluster.rendezvous with one task a node"
        raise RecipeError(fault(recipe, "cluster.devices_per_node", f"{text}; {use}"))


def on_ranks_here(recipe: Recipe) -> Recipe:
    """Return a recipe for the ranks that another launcher has started, if one has: torchrun, Accelerate's, Slurm.

    Raises RecipeError where the recipe names other ones.
    """
    world = started_ranks(recipe)
    if world is None:
        return recipe
    cluster, nodes = recipe.cluster, world.size // world.local_size
    if cluster.devices_per_node not in ("auto", world.local_size):
        text = f"{cluster.devices_per_node}, but {world.local_size} processes were started here (LOCAL_WORLD_SIZE)"
        raise RecipeError(fault(recipe, "cluster.devices_per_node", f"{text}; use {world.local_size}, or auto"))
    if recipe.writes("cluster.nodes") and nodes not in node_counts(cluster.nodes):
        text = f"{cluster.nodes}, but the processes that were started are on {nodes} (WORLD_SIZE / LOCAL_WORLD_SIZE)"
        raise RecipeError(fault(recipe, "cluster.nodes", f"{text}; use {nodes}"))
    places = cluster.model_copy(update={"nodes": nodes, "devices_per_node": world.local_size})
    return recipe.model_copy(update={"cluster": places})


def plan_again(recipe: Recipe, run_dir: Path) -> Plan:
    """Plan a recipe for this machine; a run that is gone on with keeps what was chosen for it, if that still does."""
    recipe = on_ranks_here(shaped_before(recipe, run_dir))
    hardware = chosen_hardware(recipe)
    with suppress(RecipeError, DoesNotFit):  # what was chosen then is not to blame for what is written now
        return plan(as_chosen_before(recipe, run_dir, hardware), hardware)
    return plan(recipe, hardware)


def shaped_before(recipe: Recipe, run_dir: Path) -> Recipe:
    """Return a recipe with the shape that its run has, where the weights that this one started from are gone."""
    source = recipe.train.init_from
    if source is None or (local_path(source) / PLAN_FILE).exists():
        return recipe
    earlier = earlier_recipe(run_dir)
    if earlier is None or earlier.recipe.train.init_from != source:
        return recipe
    return shaped_as(recipe, earlier.recipe.model, str(earlier.path))


def worker_environment(kind: str, processes: int = 1) -> dict[str, str]:
    """Return the environment of a training process, of so many that share this machine.

    On the CPU, tensors of a mebibyte or more are mapped and unmapped one by one: in glibc's heap those of different
    lifetimes leave holes between them, for BERT-Large 0.5 GiB of the resident memory. What is smaller stays in the
    heap, which is not given back after each micro-batch: small models step up to a tenth faster. On CUDA the
    allocator's segments grow, so that they need not be of the right sizes. Several processes share a CPU's cores. A
    value of the user's own stays.
    """
    threads = {THREADS: str(torch_threads(processes))} if kind == "cpu" and processes > 1 else {}
    return {**_allocator_settings(kind), **threads, **child_environment()}


def adopt_environment(kind: str) -> None:
    """Set in this process what a training process gets: torch reads its allocator's settings at the first use."""
    for name, value in _allocator_settings(kind).items():
        os.environ.setdefault(name, value)


def _allocator_settings(kind: str) -> dict[str, str]:
    if kind == "cpu":
        return {MMAP_THRESHOLD: str(2**20), TRIM_THRESHOLD: str(64 * 2**20), HUGE_PAGES: "1", REPEATABLE: "AUTO"}
    return {ALLOCATOR: "expandable_segments:True"}


def fetch_tokenizer(recipe: Recipe) -> None:
    """Prepare the data before planning if only that tells how large the vocabulary is: a hub tokenizer's first use."""
    if recipe.model.vocab_size != "auto" or recipe.data.tokenizer == TRAIN:
        return
    if vocabulary_size(recipe.data.tokenizer, recipe.origin("data.tokenizer")) is None:
        ensure_prepared(recipe)


def check_init_from(plan: Plan) -> None:
    """Raise RecipeError if `train.init_from` names no run and no checkpoint, or one of a model of another shape."""
    source = plan.recipe.train.init_from
    if source is None:
        return
    text = _why_not(Path(source).expanduser(), plan.recipe.model)
    if text:
        raise RecipeError(Fault(plan.recipe.origin("train.init_from"), "train.init_from", f"{source}: {text}"))


def _why_not(folder: Path, wanted: ModelSection) -> str | None:
    try:
        complete = (folder / manifest.MANIFEST).is_file() or manifest.step_folders(folder)
        foreign = not complete and (folder / "config.json").is_file()
    except OSError as error:
        return f"{error.strerror}; give a run folder, or a step-NNNNNNNN folder in one"
    if foreign:
        return f"a Hugging Face folder; first: bigtrain import {folder} OUT, and give OUT"
    if not complete:
        return "holds no checkpoint; give a run folder, or a step-NNNNNNNN folder in one"
    there = stored_recipe(folder).model
    differing = [
        f"{key} is {getattr(there, key)} there and {value} here"
        for key, value in wanted
        if key not in ("preset", "initializer_range", "norm_eps") and getattr(there, key) != value
    ]
    return f"a model of another shape: {'; '.join(differing[:3])}" if differing else None
