"""A choice in words, and shares as bars of text."""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from itertools import groupby

from bigtrain.planner.choice import Choice

BAR_WIDTH = 32

EIGHTHS = " ▏▎▍▌▋▊▉█"
"""Bars of nothing to eight eighths of a letter's width."""


def choice_lines(choice: Choice, world_size: int, tensor_ranks: int = 1) -> Iterator[str]:
    """Yield a choice in words, a line for each thing that is chosen, or given, as ranks that share products are."""
    rows = f"micro-batches of {choice.micro_batch_size}"
    yield (
        f"{rows}, {choice.accumulation_steps} to a step" if choice.accumulation_steps > 1 else f"{rows}, one to a step"
    )
    yield f"recompute {_policies(choice.recompute)}"
    if tensor_ranks > 1:
        yield f"products shared by {tensor_ranks} neighbouring ranks, which read the same rows"
    if world_size > tensor_ranks:
        yield _sharding(choice, world_size // tensor_ranks, "ranks" if tensor_ranks == 1 else "such groups")
    if choice.offload != "none":
        yield f"offloaded to the host: {choice.offload}"
    released = ", gradients released as they come" if choice.gradient_release else ""
    yield f"optimizer states in {choice.optimizer_state}, master weights {choice.master_weights}{released}"


def short_choice(choice: Choice) -> str:
    """Return a choice in a few words: those of its parts that cost something or differ from the plainest."""
    parts = [f"micro-batch {choice.micro_batch_size}", f"recompute {_policies(choice.recompute)}"]
    if choice.zero_stage:
        parts.append(f"ZeRO {choice.zero_stage}" + (f" x {choice.replicate}" if choice.replicate > 1 else ""))
    if choice.offload != "none":
        parts.append(f"offload {choice.offload}")
    if choice.optimizer_state != "fp32":
        parts.append(f"{choice.optimizer_state} states")
    if choice.master_weights != "fp32":
        parts.append(f"master weights {choice.master_weights}")
    return ", ".join([*parts, "gradient release"] if choice.gradient_release else parts)


def different_words(different: Mapping[str, object]) -> str:
    """Return what a rejected choice has different, by the names in `Choice`: micro_batch_size=16, recompute=full."""
    return ", ".join(f"{name}={_value(value)}" for name, value in different.items())


def bar(share: float, width: int = BAR_WIDTH) -> str:
    """Return a bar of a share of so many letters, to an eighth of one; what is not nothing shows."""
    eighths = round(8 * width * min(1.0, share))
    whole, rest = divmod(max(eighths, 1 if share > 0 else 0), 8)
    return EIGHTHS[8] * whole + (EIGHTHS[rest] if rest else "")


def _policies(policies: Sequence[str]) -> str:
    runs = [(policy, len(list(blocks))) for policy, blocks in groupby(policies)]
    if len(runs) == 1:
        return runs[0][0]
    return " then ".join(f"{policy} in {count}" for policy, count in runs) + " blocks"


def _value(value: object) -> str:
    if isinstance(value, list):
        return _policies(value)
    return str(value).lower() if isinstance(value, bool) else str(value)


def _sharding(choice: Choice, count: int, ranks: str) -> str:
    if not choice.zero_stage:
        return f"each of {count:,} {ranks} holds everything (ZeRO stage 0)"
    groups = f"in {choice.replicate:,} groups of {count // choice.replicate:,} {ranks}"
    return f"ZeRO stage {choice.zero_stage} " + (groups if choice.replicate > 1 else f"over {count:,} {ranks}")
