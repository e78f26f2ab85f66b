"""A run as one page, report.html: figures, curves, memory, the model, the recipe. It needs no network."""

from __future__ import annotations

import statistics
from collections.abc import Iterator, Sequence
from html import escape
from importlib import resources
from pathlib import Path
from typing import TYPE_CHECKING

from bigtrain.charts.axis import finite
from bigtrain.charts.elements import details, figure, fill, json_in_html, legend, table, words
from bigtrain.charts.lines import Chart, Line, Point, chart_data, draw, thin
from bigtrain.models.shape import parameter_table
from bigtrain.training.metrics import read_metrics
from bigtrain.training.summary import Row, evaluation_rows, figures, skipped_steps, step_rows
from bigtrain.units import format_bytes, format_count, format_flops

if TYPE_CHECKING:
    from bigtrain.planner.plan import Plan

REPORT_FILE = "report.html"

SMOOTHED_SHARE = 40
"""The smoothed loss is a median over this part of the rows to each side: 1/40."""

MEMORY_LINES = {
    "host_bytes_peak": ("host, resident", "second"),
    "reserved_bytes_peak": ("device, reserved", "dashed"),
    "allocated_bytes_peak": ("device, allocated", "main"),
}


def write_report(run_dir: Path, plan: Plan) -> Path:
    """Write a run's report.html from its metrics.jsonl, its plan and, if it is there, its env.json; return its path."""
    path, env_file = run_dir / REPORT_FILE, run_dir / "env.json"
    environment = env_file.read_text(encoding="utf-8") if env_file.is_file() else None
    path.write_text(page(read_metrics(run_dir), plan, environment), encoding="utf-8")
    return path


def page(rows: Sequence[Row], plan: Plan, environment: str | None) -> str:
    """Return the page of a run; `environment` is shown as it is, None leaves it out."""
    shown = list(charts(rows, plan))
    template = resources.files("bigtrain.training").joinpath("report_page.html").read_text(encoding="utf-8")
    return fill(
        template,
        name=escape(plan.recipe.name),
        subtitle=escape(_subtitle(plan)),
        notices="".join(f'<p class="notice">{escape(text)}</p>' for text in _notices(rows)),
        figures="\n".join(figure(one.name, one.value, one.text, one.note) for one in figures(rows, plan)),
        charts="\n".join(map(_chart, shown)),
        shape=table(_shape_cells(plan)),
        parameters=table(_parameter_cells(plan), header=("part", "parameters each", "times", "parameters", "share")),
        details=details("Recipe, as planned", plan.to_yaml()) + details("Environment", environment),
        data=json_in_html({chart.key: chart_data(chart) for chart in shown}),
    )


def charts(rows: Sequence[Row], plan: Plan) -> Iterator[Chart]:
    """Yield the charts of a run, those for which something was logged."""
    steps = step_rows(rows)
    loss = _loss_chart(steps, evaluation_rows(rows))
    drawn = [
        loss,
        Chart("learning-rate", "Learning rate", _lines(steps, "learning_rate"), "scientific", zero_based=True),
        Chart("speed", "Tokens per second", _lines(steps, "tokens_per_second"), "count", zero_based=True),
        Chart("gradient", "Gradient norm, before clipping", _lines(steps, "grad_norm"), spiky=True),
        _memory_chart(steps, plan),
    ]
    yield from (chart for chart in drawn if chart.lines)


def smooth(points: Sequence[Point]) -> list[Point]:
    """Return points whose values are medians around each, over fewer at the start, where losses fall fast.

    A mean would turn one spike into a box as wide as its window. Values that are not finite are left out.
    """
    half = len(points) // SMOOTHED_SHARE
    smoothed: list[Point] = []
    wanted = {step for step, _ in thin(points)}
    for place, (step, _) in enumerate(points):
        if step not in wanted:
            continue
        reach = min(half, place)
        window = points[place - reach : place + reach + 1]
        near = [number for _, value in window if (number := finite(value)) is not None]
        if near:
            smoothed.append((step, statistics.median(near)))
    return smoothed


def _points(rows: Sequence[Row], key: str) -> list[Point]:
    return [(row["step"], row[key]) for row in rows if row.get(key) is not None]


def _lines(rows: Sequence[Row], key: str, name: str | None = None, style: str = "main") -> list[Line]:
    points = thin(_points(rows, key))
    return [Line(name or words(key), points, style)] if points else []


def _loss_chart(steps: Sequence[Row], evaluations: Sequence[Row]) -> Chart:
    points = _points(steps, "loss")
    lines = _lines(steps, "loss", "training")
    smoothed = smooth(points) if len(points) >= SMOOTHED_SHARE else []
    if smoothed:
        lines = [*_lines(steps, "loss", "training", "faint"), Line("training, smoothed", smoothed)]
    checked = thin(_points(evaluations, "eval_loss"))
    if checked:
        lines.append(Line("evaluation", checked, "second", dotted=True))
    unigram = finite(evaluations[-1].get("eval_unigram_loss")) if evaluations else None
    levels = {} if unigram is None else {f"token frequencies alone: {unigram:.3f}": unigram}
    return Chart("loss", "Loss, in nats per labelled token", lines, levels=levels, spiky=True, width=1088, height=340)


def _memory_chart(steps: Sequence[Row], plan: Plan) -> Chart:
    lines = [line for key, (name, style) in MEMORY_LINES.items() for line in _lines(steps, key, name, style)]
    return Chart("memory", "Peak memory", lines, "bytes", bar=plan.held_bytes, zero_based=True)


def _subtitle(plan: Plan) -> str:
    model, recipe = plan.model, plan.recipe
    return (
        f"{model.family}, {model.num_hidden_layers} layers x {model.hidden_size}, "
        f"{format_count(plan.parameters)} parameters; "
        f"{recipe.train.global_batch_size} rows x {recipe.data.sequence_length} tokens a step; "
        f"{recipe.optimizer.name}, {recipe.amp.precision}; {plan.hardware.name}"
    )


def _notices(rows: Sequence[Row]) -> Iterator[str]:
    steps = step_rows(rows)
    if not steps:
        yield "No step has been logged."
    elif skipped := skipped_steps(steps):
        yield f"Skipped steps, whose loss or gradient was not finite: {skipped}. Their values are marked in red."


def _chart(chart: Chart) -> str:
    named = chart.lines if len(chart.lines) > 1 or chart.bar else ()
    entries = legend((f"{line.style} dot" if line.dotted else line.style, line.name) for line in named)
    if chart.bar:
        sizes = enumerate(chart.bar.items())
        causes = ((f"cause-{index}", f"{words(cause)} {format_bytes(size)}") for index, (cause, size) in sizes)
        entries += f"<div>model state, planned: {legend(causes)}</div>"
    return (
        f'<figure id="{chart.key}" class="{"wide" if chart.width > 600 else "half"}"><figcaption>'
        f'<h2 id="{chart.key}-title">{escape(chart.title)}</h2>{entries}</figcaption>'
        f'<div class="plot">{draw(chart)}</div></figure>'
    )


def _shape_cells(plan: Plan) -> list[tuple[str, ...]]:
    model = plan.model
    cells = {
        "family": model.family,
        "vocabulary": f"{model.vocab_size:,} ({model.padded_vocab_size:,} stored)",
        "layers": f"{model.num_hidden_layers}",
        "width": f"{model.hidden_size:,}",
        "attention heads": f"{model.num_attention_heads} x {model.head_dim}",
        "key and value heads": f"{model.num_key_value_heads}",
        "MLP width": f"{model.intermediate_size:,}",
        "positions": f"{model.max_position_embeddings:,}",
        "head shares the embedding": "yes" if model.tie_word_embeddings else "no",
        "FLOPs per token": f"{format_flops(plan.flops_per_token)}, forward and backward",
    }
    return list(cells.items())


def _parameter_cells(plan: Plan) -> list[tuple[str, ...]]:
    cells = []
    parts = {part: each for part, each in parameter_table(plan.model).items() if each}
    for part, each in parts.items():
        times = plan.model.num_hidden_layers if part == "block" else 1
        share = each * times / plan.parameters
        cells.append((words(part), f"{each:,}", f"{times}", f"{each * times:,}", f"{share:.1%}"))
    return [*cells, ("all", "", "", f"{plan.parameters:,}", "100%")]
