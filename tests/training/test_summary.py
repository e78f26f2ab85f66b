"""The main figures: exact values from the rows, what they are read against, runs in several starts."""

from __future__ import annotations

import statistics
from collections.abc import Sequence
from typing import Any

import pytest

from bigtrain.config.schema import Recipe
from bigtrain.planner.hardware import Hardware
from bigtrain.planner.plan import Plan, plan
from bigtrain.training.summary import (
    Figure,
    evaluation_note,
    evaluation_rows,
    figures,
    skipped_steps,
    starts,
    step_rows,
)

Rows = list[dict[str, Any]]
PEAK = 50e9


@pytest.fixture(scope="module")
def tiny() -> Plan:
    return make_plan("bert", "mlm")


def make_plan(family: str, objective: str) -> Plan:
    sections = {
        "name": "tiny",
        "model": {"family": family, "hidden_size": 32, "num_hidden_layers": 2, "num_attention_heads": 2},
        "data": {"vocab_size": 90, "sequence_length": 16},
        "train": {"objective": objective, "steps": 40, "global_batch_size": 8},
        "optimizer": {"learning_rate": 1e-2},
    }
    return plan(Recipe.model_validate(sections), Hardware("cpu", "a processor", 1, 8 * 2**30))


def start(*, after: int, steps: int, tokens: int = 0, rate: float = 1000.0, skipped: int = 0) -> Rows:
    """Return the rows of one start of a run: 100 tokens a step, a little slower each time."""
    rows: Rows = []
    seconds = 0.0
    for index in range(1, steps + 1):
        seconds += 100 / (rate - index)
        rows.append(row(after + index, tokens + 100 * index, seconds, rate - index, skipped))
    return rows


def row(step: int, tokens: int, seconds: float, rate: float, skipped: int = 0) -> dict[str, Any]:
    return {
        "step": step,
        "tokens": tokens,
        "loss": 9 - step / 10,
        "grad_norm": 1.0,
        "learning_rate": 1e-3,
        "tokens_per_second": rate,
        "model_flops_per_second": 1e7 * rate,
        "mfu": 1e7 * rate / PEAK,
        "hfu": 1e7 * rate / PEAK,
        "allocated_bytes_peak": None,
        "reserved_bytes_peak": None,
        "host_bytes_peak": 2**29 + step,
        "skipped": skipped,
        "seconds": seconds,
    }


def evaluation(loss: float | str, unigram: float | str = 6.0) -> dict[str, Any]:
    found = {"eval_accuracy": 0.256, "eval_perplexity": 148.4, "eval_unigram_loss": unigram}
    return {"step": 40, "tokens": 4000, "eval_loss": loss, **found}


def by_name(rows: Sequence[dict[str, Any]], tiny: Plan) -> dict[str, Figure]:
    return {figure.name: figure for figure in figures(rows, tiny)}


def test_values_are_those_of_the_rows(tiny: Plan) -> None:
    rows = [*start(after=0, steps=40), evaluation(5.25)]
    found = by_name(rows, tiny)
    steps = rows[:-1]
    assert found["Training loss"].value == steps[-1]["loss"]
    assert found["Evaluation loss"].value == 5.25
    assert found["Tokens"].value == 4000
    assert found["Time"].value == steps[-1]["seconds"]
    assert found["Tokens per second"].value == statistics.median(row["tokens_per_second"] for row in steps)
    assert found["MFU"].value == statistics.median(row["mfu"] for row in steps)
    assert found["Peak memory"].value == 2**29 + 40
    assert found["Parameters"].value == tiny.parameters


def test_figures_say_what_they_are_read_against(tiny: Plan) -> None:
    found = by_name(start(after=0, steps=40), tiny)
    assert found["Training loss"].note == "at step 40 of 40"
    assert found["MFU"].note == "median; of 50 GFLOP/s, this device's measured rate of fp32 matrix products"
    assert found["Peak memory"].note == "resident on the host, of 8.00 GiB"


def test_fast_devices_are_in_teraflops(tiny: Plan) -> None:
    rows = start(after=0, steps=1)
    rows[0].update(model_flops_per_second=4e14, mfu=0.5)
    assert "800 TFLOP/s" in by_name(rows, tiny)["MFU"].note


def test_device_memory_comes_first_where_there_is_any(tiny: Plan) -> None:
    rows = start(after=0, steps=3)
    for size, logged in enumerate(rows, 1):
        logged.update(allocated_bytes_peak=size * 2**30, reserved_bytes_peak=4 * 2**30)
    memory = by_name(rows, tiny)["Peak memory"]
    assert (memory.text, memory.value) == ("3.00 GiB", 3 * 2**30)
    assert memory.note == "allocated on the device; 4.00 GiB reserved, of 8.00 GiB"


def test_nothing_logged_leaves_what_the_plan_knows(tiny: Plan) -> None:
    assert list(by_name([], tiny)) == ["Parameters"]


def test_evaluation_alone(tiny: Plan) -> None:
    assert list(by_name([evaluation(5.0)], tiny)) == ["Evaluation loss", "Parameters"]


@pytest.mark.parametrize("text", ["nan", "inf", "-inf"])
def test_texts_for_what_is_not_finite_are_shown_as_they_are(tiny: Plan, text: str) -> None:
    rows = start(after=0, steps=3)
    rows[-1].update(loss=text, grad_norm=text)
    found = by_name([*rows, evaluation(text)], tiny)
    assert found["Training loss"].text == found["Training loss"].value == text
    assert found["Evaluation loss"].text == text
    assert found["Evaluation loss"].note == "accuracy 25.6%"


@pytest.mark.parametrize(
    ("loss", "note"),
    [
        (5.25, "0.75 nat below token frequencies alone (6.0000): context was learned; accuracy 25.6%"),
        (6.5, "0.50 nat above token frequencies alone (6.0000): no context learned yet; accuracy 25.6%"),
    ],
)
def test_evaluation_says_what_it_means(loss: float, note: str) -> None:
    assert evaluation_note(evaluation(loss), masked=True) == note


def test_evaluation_of_causal_models_has_perplexity() -> None:
    (found,) = (figure for figure in figures([evaluation(5.0)], make_plan("gpt", "clm")) if "loss" in figure.name)
    assert found.note.endswith("perplexity 148.4")
    assert evaluation_note({**evaluation(5.0), "eval_perplexity": "inf"}, masked=False).endswith("perplexity inf")


def test_rows_are_told_apart() -> None:
    rows = [*start(after=0, steps=2), evaluation(5.0)]
    assert step_rows(rows) == rows[:2]
    assert evaluation_rows(rows) == rows[2:]


def test_one_start_ends_with_its_last_row() -> None:
    rows = start(after=0, steps=50)
    assert starts(rows) == rows[-1:]
    assert starts([]) == []


def test_a_pause_within_a_start_is_not_a_new_one() -> None:
    rows = start(after=0, steps=10)
    for logged in rows[5:]:
        logged["seconds"] += 0.02
    assert starts(rows) == rows[-1:]


@pytest.mark.parametrize(("first", "second"), [(30, 10), (10, 30), (2, 38), (20, 20)])
def test_resumed_runs_add_up(tiny: Plan, first: int, second: int) -> None:
    before = start(after=0, steps=first, skipped=2)
    after = start(after=first, steps=second, tokens=100 * first, rate=400, skipped=3)
    assert starts([*before, *after]) == [before[-1], after[-1]]
    assert skipped_steps([*before, *after]) == 3
    time = by_name([*before, *after], tiny)["Time"]
    assert time.value == before[-1]["seconds"] + after[-1]["seconds"]
    assert time.note.endswith("in 2 starts")


def test_new_start_is_seen_though_its_first_row_took_longer_than_all_before() -> None:
    before = start(after=0, steps=2)
    slow = row(10, 1200, 10.0, 100.0)
    assert starts([*before, slow]) == [before[-1], slow]
