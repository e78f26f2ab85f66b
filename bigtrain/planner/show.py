"""A plan in words and bars, for a terminal."""

from __future__ import annotations

from collections.abc import Iterator
from typing import TYPE_CHECKING

from bigtrain.charts.axis import short_seconds
from bigtrain.planner.words import BAR_WIDTH, bar, choice_lines, different_words
from bigtrain.units import format_bytes, format_count, format_flops, format_seconds

if TYPE_CHECKING:
    from bigtrain.planner.plan import Plan

INDENT = " " * 13

LEAST_SHARE = 0.005
"""Of a step; parts that take less are not said."""


def plan_lines(plan: Plan) -> Iterator[str]:
    """Yield the lines that show a plan: what is trained, the choice, its speed, its memory, why other choices lost."""
    yield from _task_lines(plan)
    yield ""
    yield from _titled("choice", choice_lines(plan.choice, plan.world_size, plan.recipe.sharding.tensor_parallel))
    yield from _titled("speed", _speed_lines(plan))
    yield from _titled("sent", _sent_lines(plan))
    yield from _memory_lines(plan)
    yield from _titled("not chosen", (f"{different_words(lost.different)}: {lost.reason}" for lost in plan.rejected))
    yield from _titled("warning", plan.warnings)


def _titled(title: str, lines: Iterator[str] | tuple[str, ...]) -> Iterator[str]:
    for number, line in enumerate(lines):
        yield f"{INDENT if number else f'{title:13}'}{line}"


def _task_lines(plan: Plan) -> Iterator[str]:
    recipe, model, ranks = plan.recipe, plan.model, plan.world_size
    yield (
        f"{recipe.name}: {model.family}, {model.num_hidden_layers} layers x {model.hidden_size}, "
        f"vocabulary {model.vocab_size:,}: {plan.parameters:,} parameters"
    )
    count = f"{ranks:,} x " if ranks > 1 else ""
    each = " each" if ranks > 1 else ""
    yield f"device       {count}{plan.hardware.name}, {format_bytes(plan.hardware.memory_bytes)}{each}"
    length = recipe.data.sequence_length
    yield f"batch        {recipe.train.global_batch_size:,} rows x {length:,} tokens, all ranks"
    yield f"length       {_length(plan)}"
    yield (
        f"arithmetic   {format_flops(plan.flops_per_token)} per token, forward and backward, in {recipe.amp.precision}"
    )


def _length(plan: Plan) -> str:
    train = plan.recipe.train
    if plan.total_steps is None:
        return f"{train.epochs:g} epochs"
    tokens = plan.total_steps * train.global_batch_size * plan.recipe.data.sequence_length
    return f"{plan.total_steps:,} steps, about {format_count(tokens)} tokens"


def _speed_lines(plan: Plan) -> Iterator[str]:
    seconds = plan.seconds
    of_each = f", {plan.tokens_per_second / plan.world_size:,.0f} of a rank" if plan.world_size > 1 else ""
    rate = f"{plan.tokens_per_second:,.0f} tokens/s{of_each}, MFU {plan.mfu:.1%}"
    yield f"{short_seconds(seconds.total)} a step: {rate} (predicted)"
    parts = {
        "forward": seconds.forward_seconds,
        "backward": seconds.backward_seconds,
        "recompute": seconds.recompute_seconds,
        "optimizer": seconds.optimizer_seconds,
        "communication": seconds.communication_seconds,
        "offload": seconds.offload_seconds,
    }
    yield ", ".join(
        f"{name} {part / seconds.total:.0%}" for name, part in parts.items() if part >= LEAST_SHARE * seconds.total
    )
    if plan.total_steps is not None:
        yield f"the whole run takes {format_seconds(plan.total_steps * seconds.total)}"
    yield f"rates: {plan.rates_source}"


def _sent_lines(plan: Plan) -> Iterator[str]:
    """Yield what a rank sends in a step over which link, and how much of the time nothing hides."""
    for sent in plan.transfers:
        one = sent.collective
        what = f"{KINDS[one.kind]} {format_bytes(one.sent_bytes)} over {one.ranks:,} ranks"
        yield f"{sent.link}: {what}: {short_seconds(sent.seconds)}"
    if plan.transfers:
        whole, exposed = sum(sent.seconds for sent in plan.transfers), plan.seconds.communication_seconds
        yield f"together {short_seconds(whole)} a step, of which {short_seconds(exposed)} hide behind nothing"


KINDS = {"all_gather": "all-gather", "reduce_scatter": "reduce-scatter", "all_reduce": "all-reduce"}


def _memory_lines(plan: Plan) -> Iterator[str]:
    """Yield what the device holds at the peak of a step: all of it against the budget, and each part of it."""
    parts = memory_parts(plan)
    total = sum(parts.values())
    share = total / plan.budget_bytes
    of = "of a rank " if plan.world_size > 1 else ""
    budget = format_bytes(plan.budget_bytes)
    yield f"memory       {format_bytes(total)} {of}at the peak, {share:.0%} of {budget} (predicted)"
    yield f"  {'all':16} {format_bytes(total):>11}  {bar(share).ljust(BAR_WIDTH, '░')}"
    for part, size in parts.items():
        yield f"  {part:16} {format_bytes(size):>11}  {bar(size / total)}"


def memory_parts(plan: Plan) -> dict[str, int]:
    """Return what a device holds at the peak: live tensors by cause, and what is no tensor; no part is empty."""
    memory = plan.memory
    parts = dict(memory.by_cause)
    allocated = memory.allocated_bytes_peak
    reserved = allocated if memory.reserved_bytes_peak is None else memory.reserved_bytes_peak
    device = reserved if memory.device_bytes_peak is None else memory.device_bytes_peak
    parts["fragmentation"] = reserved - allocated
    parts["process" if plan.hardware.kind == "cpu" else "context"] = device - reserved
    return {part: size for part, size in parts.items() if size}
