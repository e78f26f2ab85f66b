"""The attention kernel of a run on a GPU: measured where the run starts, and the same one from then on."""

from __future__ import annotations

import torch

from bigtrain.checkpoint.state import TrainState
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

    All ranks call this together: the first one measures while the others wait. Nothing is chosen, and nothing said,
    where attention goes from document to document.
    """
    case = case_of(plan, state.engine.device)
    if not is_chosen(case, plan):
        return []
    among = suitable(plan, kernels() if among is None else among)
    noted = state.notes.get(KEPT_AS, {}).get(KERNEL)
    if noted is not None and not world.any(not use(noted, among)):
        return [f"attention: {noted}, as this run began"]
    found = try_all(case, clock, among) if world.first else []
    if case.device.type == "cuda":
        torch.cuda.empty_cache()
        torch.cuda.reset_peak_memory_stats()
    best = fastest(found)
    name = world.broadcast(OWN if best is None else best.name)
    if world.any(not use(name, among)):
        use(OWN, among)
        name = OWN
    state.notes[KEPT_AS] = {KERNEL: name}
    lines = [describe(name, found)]
    if noted is not None:
        lines.append(f"attention: the run began with {noted}, which is gone: losses may differ in their last digits")
    return lines


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
    """Return what attention is like in a plan: half of a micro-batch's rows hold one document, the others several."""
    length, model = plan.recipe.data.sequence_length, plan.model
    several = [length // 2, length // 4, length - length // 2 - length // 4]
    rows = [[length], several]
    lengths = [part for row in range(plan.micro_batch_size) for part in rows[row % 2] if part]
    ranks = plan.recipe.sharding.tensor_parallel
    heads = model.num_attention_heads // ranks, model.num_key_value_heads // ranks
    dtype = DTYPES.get(plan.recipe.amp.precision, torch.float32)
    return Case(lengths, heads, model.head_dim, model.causal, dtype, device)


def is_chosen(case: Case, plan: Plan) -> bool:
    """Tell whether one kernel attends to all documents, so that there is a choice."""
    fused, dropout = varlen_available(case.device), plan.recipe.train.attention_dropout
    return attention_path(case.device, fused, case.dtype, case.head_dim, dropout) == "varlen"
