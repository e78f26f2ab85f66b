"""A plan in words and bars, for a terminal."""

from __future__ import annotations

from collections.abc import Iterator

from bigtrain.planner.plan import Plan
from bigtrain.units import format_bytes, format_count, format_flops

BAR_WIDTH = 32


def plan_lines(plan: Plan) -> Iterator[str]:
    """Yield the lines that show a plan: the model, the batch, the bytes of model state by cause."""
    recipe, train = plan.recipe, plan.recipe.train
    model = plan.model
    yield (
        f"{recipe.name}: {model.family}, {model.num_hidden_layers} layers x {model.hidden_size}, "
        f"vocabulary {model.vocab_size:,}: {plan.parameters:,} parameters"
    )
    yield f"device       {plan.hardware.name}, {format_bytes(plan.hardware.memory_bytes)}"
    yield (
        f"batch        {train.global_batch_size} rows x {recipe.data.sequence_length} tokens: "
        f"{plan.accumulation_steps} micro-batches of {plan.micro_batch_size}"
    )
    yield f"length       {_length(plan)}"
    yield (
        f"arithmetic   {format_flops(plan.flops_per_token)} per token, forward and backward, in {recipe.amp.precision}"
    )
    yield from (f"warning      {warning}" for warning in plan.warnings)
    total = sum(plan.state_bytes.values())
    yield f"model state  {format_bytes(total)}; activations come on top"
    for cause, size in plan.held_bytes.items():
        bar = "█" * round(BAR_WIDTH * size / total)
        yield f"  {cause:16} {format_bytes(size):>11}  {bar}"


def _length(plan: Plan) -> str:
    train = plan.recipe.train
    if plan.total_steps is None:
        return f"{train.epochs:g} epochs"
    tokens = plan.total_steps * train.global_batch_size * plan.recipe.data.sequence_length
    return f"{plan.total_steps:,} steps, about {format_count(tokens)} tokens"
