"""The main figures of a run, from the rows of its metrics."""

from __future__ import annotations

import itertools
import statistics
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any, TypeAlias

from bigtrain.charts.axis import finite
from bigtrain.units import format_bytes, format_count, format_flops, format_seconds

if TYPE_CHECKING:
    from bigtrain.planner.plan import Plan

Row: TypeAlias = Mapping[str, Any]


@dataclass(frozen=True)
class Figure:
    """A figure for people: its text, the exact value behind it, and what it is to be read against."""

    name: str
    text: str
    value: float | str
    note: str


def step_rows(rows: Sequence[Row]) -> list[Row]:
    """Return the rows of logged steps."""
    return [row for row in rows if "loss" in row]


def evaluation_rows(rows: Sequence[Row]) -> list[Row]:
    """Return the rows of evaluations."""
    return [row for row in rows if "eval_loss" in row]


def figures(rows: Sequence[Row], plan: Plan) -> Iterator[Figure]:
    """Yield the main figures of a run, those that its rows have something for."""
    steps, evaluations = step_rows(rows), evaluation_rows(rows)
    if steps:
        length = f" of {plan.total_steps:,}" if plan.total_steps else ""
        note = f"at step {steps[-1]['step']:,}{length}"
        yield _exact("Training loss", steps[-1]["loss"], "{:.4f}".format, note)
    if evaluations:
        note = evaluation_note(evaluations[-1], masked=plan.recipe.train.objective != "clm")
        yield _exact("Evaluation loss", evaluations[-1]["eval_loss"], "{:.4f}".format, note)
    if steps:
        yield from _work(steps)
        yield from _rates(steps, plan)
        yield from _memory(steps, plan)
    each_token = f"{format_flops(plan.flops_per_token)} per token, forward and backward"
    yield _exact("Parameters", plan.parameters, format_count, each_token)


def evaluation_note(row: Row, *, masked: bool) -> str:
    """Return what an evaluation means: how far it is below the loss of token frequencies alone."""
    extra = f"accuracy {row['eval_accuracy']:.1%}" if masked else f"perplexity {_short(row['eval_perplexity'])}"
    loss, unigram = finite(row["eval_loss"]), finite(row.get("eval_unigram_loss"))
    if loss is None or unigram is None:
        return extra
    if loss < unigram:
        return f"{unigram - loss:.2f} nat below token frequencies alone ({unigram:.4f}): context was learned; {extra}"
    return f"{loss - unigram:.2f} nat above token frequencies alone ({unigram:.4f}): no context learned yet; {extra}"


def starts(steps: Sequence[Row]) -> list[Row]:
    """Return the last row of each start of a run; `seconds` counts anew in each.

    Within one start `seconds` grows by exactly the time that a row's tokens and rate stand for; less is a new start.
    """
    ends = []
    for before, row in itertools.pairwise(steps):
        rate = finite(row["tokens_per_second"])
        took = (row["tokens"] - before["tokens"]) / rate if rate else 0.0
        if row["seconds"] < before["seconds"] + 0.99 * took:
            ends.append(before)
    return [*ends, *steps[-1:]]


def skipped_steps(steps: Sequence[Row]) -> int:
    """Return how many steps of a run were skipped, in all its starts."""
    return int(steps[-1]["skipped"])


def _work(steps: Sequence[Row]) -> Iterator[Figure]:
    ends = starts(steps)
    again = f", in {len(ends)} starts" if len(ends) > 1 else ""
    yield _exact("Tokens", steps[-1]["tokens"], format_count, "read since the start, without padding")
    note = f"of steps; evaluation and saving not counted{again}"
    yield _exact("Time", sum(row["seconds"] for row in ends), format_seconds, note)


def _rates(steps: Sequence[Row], plan: Plan) -> Iterator[Figure]:
    speeds, shares = _column(steps, "tokens_per_second"), _column(steps, "mfu")
    if speeds:
        yield _exact("Tokens per second", statistics.median(speeds), format_count, "median of the logged steps")
    share, rate = finite(steps[-1]["mfu"]), finite(steps[-1]["model_flops_per_second"])
    if share and rate:
        against = f"this device's measured rate of {plan.recipe.amp.precision} matrix products"
        note = f"median; of {_flops_text(rate / share)}, {against}"
        yield _exact("MFU", statistics.median(shares), "{:.1%}".format, note)


def _memory(steps: Sequence[Row], plan: Plan) -> Iterator[Figure]:
    there = format_bytes(plan.hardware.memory_bytes)
    host, allocated = _column(steps, "host_bytes_peak"), _column(steps, "allocated_bytes_peak")
    if allocated:
        reserved = max(_column(steps, "reserved_bytes_peak"), default=0)
        note = f"allocated on the device; {format_bytes(int(reserved))} reserved, of {there}"
        yield _exact("Peak memory", int(max(allocated)), format_bytes, note)
    elif host:
        note = f"resident on the host, of {there}"
        yield _exact("Peak memory", int(max(host)), format_bytes, note)


def _exact(name: str, value: Any, text: Callable[[Any], str], note: str) -> Figure:
    return Figure(name, value if isinstance(value, str) else text(value), value, note)


def _column(steps: Sequence[Row], key: str) -> list[float]:
    return [number for row in steps if (number := finite(row[key])) is not None]


def _flops_text(rate: float) -> str:
    return f"{rate / 1e9:.3g} GFLOP/s" if rate < 1e12 else f"{rate / 1e12:,.0f} TFLOP/s"


def _short(value: float | str) -> str:
    return value if isinstance(value, str) else f"{value:,.1f}"
