"""How a run saves: with or without a copy, and what it says of that and of the disk before it starts."""

from __future__ import annotations

from pathlib import Path

from bigtrain.checkpoint.saver import Saver
from bigtrain.checkpoint.space import space_warning
from bigtrain.checkpoint.store import CheckpointStore
from bigtrain.memory.state import saved_bytes
from bigtrain.planner.plan import Plan
from bigtrain.world import World


def saver_for(plan: Plan, store: CheckpointStore, world: World) -> Saver:
    """Return what saves a run's checkpoints. All ranks call this together."""
    if not copies_first(plan):
        return Saver(store, world)
    return Saver(store, world, copies=True, background=world.for_thread(plan.recipe.cluster.timeout))


def copies_first(plan: Plan) -> bool:
    """Tell whether a save copies the state and writes while training goes on.

    A CPU's state is in host memory already: a copy would double it, and writing takes the cores that train.
    """
    return plan.recipe.checkpoint.asynchronous and plan.hardware.kind != "cpu"


def saving_lines(plan: Plan, folder: Path) -> list[str]:
    """Return what there is to say of a run's checkpoints before its first step."""
    section = plan.recipe.checkpoint
    lines = []
    if section.asynchronous and not copies_first(plan):
        lines.append("checkpoints: on a CPU they are written without a copy, while training waits")
    warning = space_warning(folder, saved_bytes(plan.recipe, plan.model), section.keep)
    return [*lines, f"warning: {warning}"] if warning else lines
