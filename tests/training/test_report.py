"""report.html: whole, self-contained and safe, its numbers those of metrics.jsonl, whatever the run was."""

from __future__ import annotations

import json
import math
import re
import shutil
import subprocess
from collections.abc import Iterable
from pathlib import Path
from typing import Any

import pytest
from taken_apart import Page

from bigtrain.charts.lines import LONGEST_LINE
from bigtrain.config.schema import Recipe
from bigtrain.planner.hardware import Hardware
from bigtrain.planner.plan import Plan, plan
from bigtrain.training.metrics import METRICS_FILE, read_metrics
from bigtrain.training.report import REPORT_FILE, charts, page, smooth, write_report

Rows = list[dict[str, Any]]
CHARTS = ["loss", "learning-rate", "speed", "gradient", "memory"]
CHROMIUM = shutil.which("chromium")


@pytest.fixture(scope="module")
def tiny() -> Plan:
    sections = {
        "name": "tiny_bert",
        "model": {"family": "bert", "hidden_size": 32, "num_hidden_layers": 2, "num_attention_heads": 2},
        "data": {"source": ["a & b.txt", "<c>.txt"], "vocab_size": 90, "sequence_length": 16},
        "train": {"objective": "mlm", "steps": 100, "global_batch_size": 8},
        "optimizer": {"learning_rate": 1e-2},
    }
    return plan(Recipe.model_validate(sections), Hardware("cpu", "A <fast> CPU", 1, 8 * 2**30))


def run(steps: int, *, after: int = 0) -> Rows:
    """Return the rows of a run whose loss falls; each tenth step evaluated."""
    rows: Rows = []
    for step in range(after + 1, after + steps + 1):
        rows.append(step_row(step, seconds=(step - after) / 7))
        if step % 10 == 0:
            rows.append(evaluation_row(step))
    return rows


def step_row(step: int, *, seconds: float, **keys: Any) -> dict[str, Any]:
    return {
        "step": step,
        "tokens": 128 * step,
        "loss": 4 + 5 / math.sqrt(step) + math.sin(step) / 10,
        "grad_norm": 1 + math.cos(step) / 3,
        "learning_rate": 1e-2 * (1 - step / 1e6),
        "tokens_per_second": 896.0,
        "model_flops_per_second": 896e7,
        "mfu": 0.3 + step / 1e6,
        "hfu": 0.3 + step / 1e6,
        "allocated_bytes_peak": None,
        "reserved_bytes_peak": None,
        "host_bytes_peak": 2**28 + step,
        "loss_scale": 1.0,
        "skipped": 0,
        "seconds": seconds,
        **keys,
    }


def evaluation_row(step: int) -> dict[str, Any]:
    loss = 4 + 5 / math.sqrt(step)
    found = {"eval_loss": loss, "eval_accuracy": 0.25, "eval_perplexity": math.exp(loss), "eval_unigram_loss": 4.75}
    return {"step": step, "tokens": 128 * step, **found, "eval_labels": 500}


def write_rows(folder: Path, rows: Iterable[dict[str, Any]]) -> None:
    (folder / METRICS_FILE).write_text("".join(json.dumps(row) + "\n" for row in rows))


def logged(rows: Rows, key: str) -> list[list[Any]]:
    return [[row["step"], row[key]] for row in rows if row.get(key) is not None]


def test_page_is_written_from_the_run_folder(tmp_path: Path, tiny: Plan) -> None:
    write_rows(tmp_path, run(20))
    (tmp_path / "env.json").write_text('{"python": "3.11.9"}')
    path = write_report(tmp_path, tiny)
    assert path == tmp_path / REPORT_FILE
    text = path.read_text(encoding="utf-8")
    assert text == page(read_metrics(tmp_path), tiny, '{"python": "3.11.9"}')
    assert Page(text).inside("summary") == ["Recipe, as planned", "Environment"]


def test_environment_may_be_missing(tmp_path: Path, tiny: Plan) -> None:
    write_rows(tmp_path, run(2))
    assert Page(write_report(tmp_path, tiny).read_text()).inside("summary") == ["Recipe, as planned"]


def test_page_is_well_formed(tiny: Plan) -> None:
    shown = Page(page(run(100), tiny, "{}"))
    assert not shown.mismatched
    names = [attributes["id"] for _, attributes in shown.elements if "id" in attributes]
    assert len(set(names)) == len(names)
    assert "$" not in "".join(shown.inside("h1") + shown.inside("style") + shown.inside("p"))


def test_page_needs_nothing_else(tiny: Plan) -> None:
    text = page(run(100), tiny, "{}")
    assert not re.findall(r"https?:|url\(|@import|\bfetch\(|XMLHttp", text)
    shown = Page(text)
    assert not [tag for tag, attributes in shown.elements if attributes.keys() & {"src", "href"}]
    assert "default-src 'none'" in str(shown.attributes("meta", "content"))


def test_charts_are_titled(tiny: Plan) -> None:
    shown = Page(page(run(100), tiny, None))
    assert shown.attributes("svg", "data-chart") == CHARTS
    names = {attributes.get("id") for _, attributes in shown.elements}
    assert set(shown.attributes("svg", "aria-labelledby")) <= names
    assert set(shown.attributes("svg", "aria-describedby")) <= names
    assert set(shown.attributes("svg", "role")) == {"img"}


def test_data_equal_the_metrics(tmp_path: Path, tiny: Plan) -> None:
    write_rows(tmp_path, run(100))
    rows = read_metrics(tmp_path)
    data = Page(write_report(tmp_path, tiny).read_text()).data
    assert list(data) == CHARTS
    lines = {line["name"]: line["points"] for chart in data.values() for line in chart["lines"]}
    assert lines["training"] == logged(rows, "loss")
    assert lines["evaluation"] == logged(rows, "eval_loss")
    assert lines["learning rate"] == logged(rows, "learning_rate")
    assert lines["tokens per second"] == logged(rows, "tokens_per_second")
    assert lines["grad norm"] == logged(rows, "grad_norm")
    assert lines["host, resident"] == logged(rows, "host_bytes_peak")


def test_figures_hold_exact_values(tiny: Plan) -> None:
    rows = run(100)
    values = Page(page(rows, tiny, None)).attributes("data", "value")
    last = rows[-2]
    for exact in (last["loss"], rows[-1]["eval_loss"], last["tokens"], last["seconds"], tiny.parameters):
        assert str(exact) in values


def test_long_runs_are_thinned(tiny: Plan) -> None:
    rows = run(3000)
    text = page(rows, tiny, None)
    for chart in Page(text).data.values():
        for line in chart["lines"]:
            assert len(line["points"]) <= LONGEST_LINE
            assert line["name"] == "training, smoothed" or line["points"][-1][0] == 3000
    assert len(text) < 300_000


def test_no_rows(tmp_path: Path, tiny: Plan) -> None:
    shown = Page(write_report(tmp_path, tiny).read_text())
    assert not shown.mismatched
    assert "No step has been logged." in shown.inside("p")
    assert shown.data == {}
    assert not shown.attributes("svg", "role")


def test_one_row(tiny: Plan) -> None:
    shown = Page(page(run(1), tiny, None))
    assert not shown.mismatched
    assert list(shown.data) == CHARTS
    assert len(shown.attributes("circle", "class")) == len(CHARTS)


def test_evaluations_alone(tiny: Plan) -> None:
    shown = Page(page([evaluation_row(10)], tiny, None))
    assert list(shown.data) == ["loss"]
    assert not shown.mismatched


def test_losses_that_are_not_finite(tiny: Plan) -> None:
    rows = run(60)
    rows[30].update(loss="nan", grad_norm="inf", skipped=1)
    for row in rows[31:]:
        row["skipped"] = 1 if "loss" in row else None
    shown = Page(page(rows, tiny, None))
    assert not shown.mismatched
    assert any(text.startswith("Skipped steps") and ": 1." in text for text in shown.inside("p"))
    assert shown.attributes("line", "class").count("bad") == 2
    lines = {line["name"]: line["points"] for line in shown.data["loss"]["lines"]}
    assert [rows[30]["step"], "nan"] in lines["training"]
    assert all(isinstance(value, float) for _, value in lines["training, smoothed"])


def test_run_that_was_never_finite(tiny: Plan) -> None:
    rows = [step_row(step, seconds=step / 7, loss="nan", grad_norm="nan", skipped=step) for step in range(1, 60)]
    shown = Page(page(rows, tiny, None))
    assert not shown.mismatched
    assert "nan" in shown.inside("data")


def test_resumed_run(tiny: Plan) -> None:
    rows = [*run(30), *run(20, after=30)]
    text = page(rows, tiny, None)
    shown = Page(text)
    assert "in 2 starts" in text
    assert str(30 / 7 + 20 / 7) in shown.attributes("data", "value")
    assert shown.data["loss"]["lines"][0]["points"] == logged(rows, "loss")


def test_device_memory_is_drawn_beside_the_host(tiny: Plan) -> None:
    rows = [step_row(step, seconds=step / 7, allocated_bytes_peak=2**30, reserved_bytes_peak=2**31) for step in (1, 2)]
    names = [line["name"] for line in Page(page(rows, tiny, None)).data["memory"]["lines"]]
    assert names == ["host, resident", "device, reserved", "device, allocated"]


def test_planned_state_stands_beside_memory(tiny: Plan) -> None:
    memory = list(charts(run(3), tiny))[-1]
    assert memory.bar == tiny.held_bytes
    text = page(run(3), tiny, None)
    assert text.count("<rect") == len(tiny.held_bytes)
    assert "optimizer state" in text


def test_unigram_loss_is_a_level(tiny: Plan) -> None:
    assert next(charts(run(20), tiny)).levels == {"token frequencies alone: 4.750": 4.75}
    assert not next(charts(run(5), tiny)).levels


def test_parameters_add_up(tiny: Plan) -> None:
    cells = Page(page([], tiny, None)).inside("td")
    assert f"{tiny.parameters:,}" in cells
    total = cells.index("100%")
    assert cells[total - 1] == f"{tiny.parameters:,}"


@pytest.mark.parametrize(
    "hostile", ["</script><script>alert(1)</script>", "<!--", "</pre><b>", "&lt;", "$name ${name}"]
)
def test_texts_of_others_stay_text(tiny: Plan, hostile: str) -> None:
    quiet, loud = (Page(page(run(3), tiny, text)) for text in ("quiet", hostile))
    assert loud.elements == quiet.elements
    assert hostile in "".join(loud.inside("pre"))


def test_recipe_is_shown_as_it_is(tiny: Plan) -> None:
    shown = Page(page(run(3), tiny, None))
    assert "".join(shown.inside("pre")) == tiny.to_yaml()
    assert "A <fast> CPU" in "".join(shown.inside("p"))


def test_smoothing_stays_on_a_falling_line() -> None:
    points = [(step, 100.0 - step) for step in range(100)]
    assert smooth(points)[:98] == points[:98]


def test_smoothing_passes_over_a_spike_and_what_is_not_finite() -> None:
    points: list[tuple[int, float | str]] = [(step, 5.0) for step in range(100)]
    points[40], points[60] = (40, 1e9), (60, "nan")
    assert smooth(points) == [(step, 5.0) for step in range(100)]


def test_smoothing_of_nothing_finite_is_nothing() -> None:
    assert smooth([(1, "nan"), (2, "inf")]) == []


@pytest.mark.slow
@pytest.mark.skipif(CHROMIUM is None, reason="no chromium on PATH")
def test_pointing_at_a_chart_shows_the_step(tmp_path: Path, tiny: Plan) -> None:
    rows = run(60)
    rows[-3].update(grad_norm="nan")
    write_rows(tmp_path, rows)
    path = write_report(tmp_path, tiny)
    ask = (
        '<script>for (const svg of document.querySelectorAll("svg")) {'
        "const box = svg.getBoundingClientRect();"
        'svg.dispatchEvent(new PointerEvent("pointermove", {clientX: box.left + box.width / 2}));'
        'svg.dispatchEvent(new KeyboardEvent("keydown", {key: "End"}));'
        'if (svg.dataset.chart === "gradient") svg.dispatchEvent(new KeyboardEvent("keydown", {key: "ArrowLeft"}));'
        "}</script></body>"
    )
    path.write_text(path.read_text().replace("</body>", ask))
    shown = Page(dom(path, tmp_path / "profile"))
    if shown.inside("h1") != ["tiny_bert"]:
        pytest.skip("this chromium may not read files here")
    found = shown.inside("div")
    last = rows[-2]
    loss = f"step 60\ntraining  {last['loss']:.6g}\n"
    assert any(text.startswith(loss) and f"evaluation  {rows[-1]['eval_loss']:.6g}" in text for text in found)
    assert "step 59\ngrad norm  nan" in found
    assert "step 60\nhost, resident  256.000 MiB" in found


def dom(path: Path, profile: Path) -> str:
    """Return the page as it stands in a browser once its scripts have run."""
    switches = ["--headless", "--no-sandbox", "--disable-gpu", "--disable-quic", "--no-first-run", "--disable-sync"]
    offline = ["--disable-background-networking", "--disable-component-update", f"--user-data-dir={profile}"]
    command = [str(CHROMIUM), *switches, *offline, "--dump-dom", path.as_uri()]
    return subprocess.run(command, capture_output=True, text=True, check=False, timeout=60).stdout
