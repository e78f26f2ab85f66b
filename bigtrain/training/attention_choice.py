"""The attention kernel of a run on a GPU: measured where the run starts, and the same one from then on."""

from __future__ import annotations

import torch

from bigtrain import heartbeat
from bigtrain.checkpoint.state import TrainState
from bigtrain.memory.predict import micro_batch
from bigtrain.models.attention import attention_path, varlen_available
from bigtrain.models.attention_kernels import (
    OWN,
    Case,
    Clock,
    Found,
    Kernel,
    cuda_clock,
    fastest,
    kernels,
    try_all,
    use,
)
from bigtrain.planner.plan import Plan
from bigtrain.world import World

KEPT_AS, KERNEL = "attention", "kernel"
"""Where `TrainState.notes` have the kernel's name."""

DTYPES = {"bf16": torch.bfloat16, "fp16": torch.float16, "fp8": torch.bfloat16}


def choose_attention(
    plan: Plan, state: TrainState, world: World, among: list[Kernel] | None = None, clock: Clock = cuda_clock
) -> list[str]:
    """Take the kernel that a run began with, or the fastest of those that are here; return what there is to say.

    All ranks call this together: the first one measures while the others wait, and each tries what is to be taken.
    Nothing is chosen, and nothing said, where attention goes from document to document.
    """
    case = case_of(plan, state.engine.device)
    if not is_chosen(case, plan):
        return []
    among = suitable(plan, kernels() if among is None else among)
    noted, lines = state.notes.get(KEPT_AS, {}).get(KERNEL), []
    if noted is not None:
        fault = _take(noted, case, among, world)
        if not fault:
            _forget_trials(case)
            return [f"attention: {noted}, as this run began"]
        lines.append(f"attention: the run began with {noted}, which is {fault}: losses may differ in their last digits")
        among = [kernel for kernel in among if kernel.name != noted or noted == OWN]
    found = _measured(case, clock, among, world)
    best = fastest(found)
    name = world.broadcast(OWN if best is None else best.name)
    fault = _take(name, case, among, world)
    if fault:
        lines.append(f"attention: {name} was the fastest, and is {fault}, on one rank at least")
        use(OWN, among)
        name = OWN
    _forget_trials(case)
    state.notes[KEPT_AS] = {KERNEL: name}
    return [describe(name, found), *lines]


def _take(name: str, case: Case, among: list[Kernel], world: World) -> str:
    """Have all ranks attend with a kernel, once each has tried it; return what is wrong with it on any, or nothing."""
    return next(filter(None, world.gather(use(name, among, case))), "")


def _measured(case: Case, clock: Clock, among: list[Kernel], world: World) -> list[Found]:
    """Return the first rank's trials, to it alone; ranks meet after each, so that none waits for all of them."""

    def meet() -> None:
        heartbeat.beat()
        world.any(False)

    if world.first:
        return try_all(case, clock, among, meet)
    for _ in among:
        meet()
    return []


def _forget_trials(case: Case) -> None:
    if case.device.type == "cuda":
        torch.cuda.empty_cache()
        torch.cuda.reset_peak_memory_stats()


def describe(name: str, found: list[Found]) -> str:
    """Return the choice as a line for people: the kernel, and what was found of all."""
    trials = ", ".join(str(one) for one in found)
    return f"attention: {name}, measured on this run's shapes: {trials}" if trials else f"attention: {name}"


def suitable(plan: Plan, among: list[Kernel]) -> list[Kernel]:
    """Return the kernels that a plan can use: compiled blocks, and those that keep products, know torch's alone."""
    recipe = plan.recipe
    torchs_alone = recipe.train.compile or "selective" in recipe.recompute.policy
    return [kernel for kernel in among if kernel.compiles or not torchs_alone]


def case_of(plan: Plan, device: torch.device) -> Case:
    """Return what attention is like in a plan: half of a micro-batch's rows hold one document, the others several.

    Packed rows leave places for documents empty, at the end.
    """
    length, model = plan.recipe.data.sequence_length, plan.model
    several = [length // 2, length // 4, length - length // 2 - length // 4]
    rows = [[length], several]
    lengths = [part for row in range(plan.micro_batch_size) for part in rows[row % 2] if part]
    if plan.recipe.data.packing:
        places = micro_batch(plan.recipe, plan.micro_batch_size).documents
        lengths += [0] * max(1, places - len(lengths))
    ranks = plan.recipe.sharding.tensor_parallel
    heads = model.num_attention_heads // ranks, model.num_key_value_heads // ranks
    dtype = DTYPES.get(plan.recipe.amp.precision, torch.float32)
    return Case(lengths, heads, model.head_dim, model.causal, dtype, device)


def is_chosen(case: Case, plan: Plan) -> bool:
    """Tell whether one kernel attends to all documents, so that there is a choice."""
    fused, dropout = varlen_available(case.device), plan.recipe.train.attention_dropout
    return attention_path(case.device, fused, case.dtype, case.head_dim, dropout) == "varlen"
