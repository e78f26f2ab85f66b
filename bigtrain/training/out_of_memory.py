"""What a run says when memory ends all the same: who holds it, how far off the prediction was, what would fit."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager

from bigtrain.engine import Engine
from bigtrain.errors import OutOfMemory
from bigtrain.memory.exhausted import Exhausted, exhausted, is_out_of_memory
from bigtrain.memory.report import MemoryReport
from bigtrain.placement import find_blocks
from bigtrain.planner.offers import Offers, changed
from bigtrain.planner.plan import Plan
from bigtrain.planner.price import memory_of
from bigtrain.planner.ranking import fastest
from bigtrain.planner.refusal import refused
from bigtrain.training.runtime import host_bytes_peak
from bigtrain.units import exact_bytes


@contextmanager
def memory_explained(plan: Plan, engine: Engine) -> Iterator[None]:
    """Raise OutOfMemory, with all that is known, in place of torch's error; nothing is tried again."""
    try:
        yield
    except RuntimeError as error:
        if is_out_of_memory(error):
            raise out_of_memory(error, plan, engine) from error
        raise


def out_of_memory(error: RuntimeError, plan: Plan, engine: Engine) -> OutOfMemory:
    """Return the error for a step of a plan that ran out of memory, a line each for what a reader wants to know.

    `error` is one for which `memory.exhausted.is_out_of_memory` holds, with its traceback.
    """
    model, predicted = engine.model, memory_of(plan.recipe, plan.model, plan.hardware, plan.world_size)
    names = {id(module): name for name, module in model.named_modules()}
    found = exhausted(
        error,
        model,
        engine.optimizer,
        [names[id(block)] for block in find_blocks(model)],
        device=plan.hardware.kind,
        resident_bytes=host_bytes_peak(),
    )
    first, *rest = found.lines(predicted)
    step = f"step {engine.steps_taken + 1}: {first}"
    return OutOfMemory("\n".join([step, *rest, _advice(plan, found, predicted)]))


def _advice(plan: Plan, found: Exhausted, predicted: MemoryReport) -> str:
    """Return the cheapest change that is predicted to fit into what was held, as far off as the prediction was."""
    budget = fitting_budget_bytes(found, predicted)
    offers = Offers(changed(plan.recipe, "memory.budget", budget), plan.model, plan.hardware, plan.world_size)
    if fastest(offers) is not None:  # a smaller budget makes the loss hold fewer logits at a time
        change = f"memory.budget={exact_bytes(budget)}"
    else:
        change = refused(offers).change
        if change.startswith("memory.budget"):
            return "no single change of the recipe is predicted to fit; take a smaller model, or more memory"
    return f"the cheapest change that is predicted to fit: {change}"


def fitting_budget_bytes(found: Exhausted, predicted: MemoryReport) -> int:
    """Return what a plan may need of the device by its prediction, so that it really stays within what was held."""
    assert predicted.device_bytes_peak is not None
    peak = found.predicted_bytes(predicted)
    held = round(found.held_bytes * min(1.0, peak / found.needed_bytes))
    return max(0, predicted.device_bytes_peak - (peak - held))
