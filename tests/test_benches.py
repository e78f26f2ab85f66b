"""scripts/bench_against.py and scripts/bench_step.py: the same rows and weights for every arm, files that go on."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from argparse import Namespace
from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest

REPOSITORY = Path(__file__).parents[1]
TINY = ("model.hidden_size=32", "data.vocab_size=320", "data.sequence_length=48", "optimizer.learning_rate=1e-2",
        "train.dropout=0", "train.device=cpu", "train.masking_probability=0.15")  # fmt: skip
RECIPES = {"gpt": "quickstart_gpt", "bert": "quickstart_bert"}


@pytest.fixture(scope="module")
def bench() -> Iterator[Any]:
    """Return scripts/bench_against.py as a module; its neighbours are found as when it runs."""
    with pytest.MonkeyPatch.context() as patch:
        patch.syspath_prepend(REPOSITORY / "scripts")
        import bench_against

        yield bench_against


def tiny(bench: Any, family: str = "gpt", **more: Any) -> Any:
    return bench.Job(**{"arm": "", "recipe": RECIPES[family], "overrides": TINY, "rows": 4, "steps": 5, **more})


def source(bench: Any, job: Any) -> Any:
    from arms.rows import Source

    return Source(job.plan(), job)


@pytest.mark.parametrize("family", ["gpt", "bert"])
def test_full_rows_are_the_same_for_every_arm(bench: Any, family: str) -> None:
    import torch

    job = tiny(bench, family)
    packed, (rows, tokens), plain = (
        source(bench, job).packed(),
        source(bench, job).rows(),
        source(bench, job).end_to_end(),
    )
    assert len(packed) == len(tokens) == len(plain) == 8 and tokens == [4 * 48] * 8
    for step, batch in enumerate(packed):
        theirs = torch.stack([row["input_ids"] for row in rows[4 * step : 4 * step + 4]])
        labels = torch.stack([row["labels"] for row in rows[4 * step : 4 * step + 4]])
        assert torch.equal(batch["input_ids"], theirs) and torch.equal(batch["input_ids"], plain[step][0])
        moved = batch["labels"].roll(1, dims=1) if family == "gpt" else batch["labels"]
        assert torch.equal(moved, labels)
    assert torch.equal(packed[0]["input_ids"], packed[4]["input_ids"])


@pytest.mark.parametrize("family", ["gpt", "bert"])
def test_documents_have_the_mean_length_and_are_packed_or_padded(bench: Any, family: str) -> None:
    from arms.rows import padded

    job = tiny(bench, family, mode="documents", mean_length=20, rows=16, steps=20)
    packed, (rows, tokens) = source(bench, job).packed(), source(bench, job).rows()
    assert sum(tokens) / len(rows) == pytest.approx(20, rel=0.1)
    assert sum(int(batch["document_lengths"].sum()) for batch in packed) / (len(packed) * 16 * 48) > 0.95
    batch = padded(rows[:16])
    assert int(batch["attention_mask"].sum()) == tokens[0]
    assert batch["input_ids"].shape == batch["labels"].shape == (16, max(len(row["input_ids"]) for row in rows[:16]))
    assert source(bench, job).attended_length() > 20
    one = packed[0]
    held = one["labels"][0][: int(one["document_lengths"][0].sum())] != -100
    first = int(one["document_lengths"][0][0])
    assert bool(held.any()) and (family == "bert" or not bool(held[first - 1]))


@pytest.mark.slow
@pytest.mark.parametrize(("family", "accumulation"), [("gpt", 1), ("bert", 2)])
def test_bigtrain_and_transformers_agree_about_the_loss(
    bench: Any, family: str, accumulation: int, tmp_path: Path
) -> None:
    """Rows, weights, optimizer and learning rate are the same, so that only the speed differs; so is the loop by hand's
    model, whose compilation would take longer than the rest."""
    import torch
    from arms import ours, plain
    from arms.facts import write_weights

    job = tiny(bench, family, folder=str(tmp_path), rows=4 // accumulation, accumulation=accumulation)
    plan = job.plan()
    write_weights(plan, tmp_path)
    with torch.no_grad():
        ids, labels, _ = source(bench, job).end_to_end()[0]
        inputs = plain._inputs(ids, labels, plan.recipe, plan.model.causal)
        by_hand = float(plain._model(plan, job)(*inputs))
    mine, theirs = ours.run(job), bench.in_process("hf", replace(job, arm="hf"), seconds=300)
    assert by_hand == pytest.approx(mine["losses"][0], abs=1e-4)
    assert mine["losses"] == pytest.approx(theirs["losses"], abs=2e-2)
    assert mine["losses"][-1] < mine["losses"][0] - 0.1
    assert len(mine["step_seconds"]) == len(mine["tokens"]) == 5 and mine["tokens"] == theirs["tokens"]
    assert 0 < mine["outside_share"] < 1 and mine["host_bytes_peak"] > 0


def test_the_step_of_a_recipe_is_timed_on_its_own_rows(bench: Any, corpus_file: Path) -> None:
    import bench_step

    keys = (*TINY, f"data.source={corpus_file}", "data.vocab_size=320", "train.micro_batch_size=8")
    options = Namespace(recipe="quickstart_gpt", overrides=list(keys), work=None)
    found = bench_step.run(bench.Job("bigtrain", "", (), mode="loader", steps=3), bench_step._plan(options))
    assert found["micro_batch_size"] == 8 and found["loader_ratio"] > 1 and 0 < found["outside_share"] < 1
    summary = bench_step.summarize([found, found])
    assert summary["rounds"] == 2 and summary["tokens_per_second"] == found["tokens_per_second"]


FACTS = {
    "hardware": {"kind": "cpu", "name": "some", "cores": 2}, "precision": "fp32", "dropout": 0.0,
    "attention_dropout": 0.0, "rates": "measured here", "parameters": 1, "flops_per_token": 10,
    "attended_length": 48, "same_weights": True,
    "peak_flops_per_second": None, "measured_flops_per_second": 1000.0, "predicted_tokens_per_second": 1.0,
}  # fmt: skip


def found(rate: float) -> dict[str, Any]:
    return {"tokens_per_second": rate, "seconds_per_step": 1.0, "host_bytes_peak": 100, "allocated_bytes_peak": None,
            "loss_first": 3.0, "loss_last": 2.0}  # fmt: skip


def options(**more: Any) -> Namespace:
    common = {"arms": ["bigtrain", "hf", "plain"], "rounds": 3, "work": "w", "again": False, "timeout": None}
    return Namespace(**{**common, "micro_batch": "equal", "most_rows": 64, "output": None, **more})


def test_rounds_that_are_there_are_not_measured_again(
    bench: Any, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    asked: list[str] = []

    def run(arm: str, *_: Any) -> dict[str, Any]:
        asked.append(arm)
        rates = {"bigtrain": 200.0, "hf": 100.0 + len(asked)}
        return found(rates[arm]) if arm in rates else {"not_run": "no compiler"}

    monkeypatch.setattr(bench, "in_process", run)
    path = tmp_path / "speed" / "cpu.jsonl"
    for rounds in (1, 3):
        asked.clear()
        bench.Measurement(options(output=path, rounds=rounds), tiny(bench), FACTS).run()
    assert asked == ["plain", "hf", "bigtrain", "bigtrain", "hf"]  # the order moves on; a new start tries plain again
    lines = [json.loads(line) for line in path.read_text().splitlines()]
    assert [line["arm"] for line in lines if "arm" in line].count("hf") == 3
    last = lines[-1]["summary"]
    ratios = last["hf"]["bigtrain_ratio"]
    assert len(ratios["rounds"]) == 3 and 1.8 < ratios["median"] < 2 and last["hf"]["loss_difference"] == 0
    assert last["plain"] == {"not_run": "no compiler"} and last["bigtrain"]["mfu_measured"] == 2
    assert {"commit", "edited", "versions", "command", "dropout", "hardware", "mode"} <= set(lines[0])
    bench.Measurement(options(output=path, again=True, arms=["hf"], rounds=1), tiny(bench), FACTS).run()
    assert len(path.read_text().splitlines()) == len(lines) + 2


def test_an_arm_without_the_memory_or_the_time_is_not_tried_in_every_call(
    bench: Any, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    asked: list[str] = []
    reasons = {"hf": "took longer than 400 s", "plain": "out of memory with micro-batches of 4"}

    def run(arm: str, *_: Any) -> dict[str, Any]:
        asked.append(arm)
        return {"not_run": reasons[arm]} if arm in reasons else found(200.0)

    monkeypatch.setattr(bench, "in_process", run)
    path = tmp_path / "a.jsonl"
    for _ in range(2):
        bench.Measurement(options(output=path, rounds=2), tiny(bench), FACTS).run()
    assert asked == ["bigtrain", "hf", "plain", "bigtrain"]
    assert json.loads(path.read_text().splitlines()[-1])["summary"]["hf"] == {"not_run": reasons["hf"]}
    bench.Measurement(options(output=path, rounds=1, again=True), tiny(bench), FACTS).run()
    assert asked[4:] == ["bigtrain", "hf", "plain"]


def test_a_line_that_is_torn_is_cut_off(bench: Any, tmp_path: Path) -> None:
    path = tmp_path / "a.jsonl"
    bench.results.append(path, {"a": 1})
    path.write_bytes(path.read_bytes() + b'{"b": ')
    assert bench.results.read(path) == [{"a": 1}]
    bench.results.append(path, {"c": 2})
    assert bench.results.read(path) == [{"a": 1}, {"c": 2}]


def test_the_best_micro_batch_is_searched_once(bench: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    asked: list[int] = []

    def run(_arm: str, job: Any, *_: Any) -> dict[str, Any]:
        asked.append(job.rows)
        return found({4: 10.0, 8: 20.0, 16: 19.9}[job.rows]) if job.rows < 32 else {"not_run": "out of memory"}

    monkeypatch.setattr(bench, "in_process", run)
    measurement = bench.Measurement(
        options(arms=["bigtrain"], rounds=2, micro_batch="best"), tiny(bench, accumulation=4), FACTS
    )
    measurement.run()
    assert asked == [4, 8, 16, 32, 8, 8]
    assert [(line["micro_batch_size"], line["accumulation_steps"]) for line in measurement._lines] == [(8, 2)] * 2


def test_where_the_first_micro_batch_does_not_run_that_is_the_result(
    bench: Any, monkeypatch: pytest.MonkeyPatch
) -> None:
    asked: list[int] = []

    def run(_arm: str, job: Any, *_: Any) -> dict[str, Any]:
        asked.append(job.rows)
        return {"not_run": "exit 1: no"}

    monkeypatch.setattr(bench, "in_process", run)
    best = options(arms=["bigtrain"], rounds=2, micro_batch="best")
    measurement = bench.Measurement(best, tiny(bench), FACTS)
    measurement.run()
    (line,) = measurement._lines
    assert asked == [4] and (line["not_run"], line["tried"]) == ("exit 1: no", {})


@pytest.mark.parametrize("script", ["bench_against", "bench_step"])
def test_a_process_of_an_arm_ends_with_the_one_that_started_it(bench: Any, script: str) -> None:
    """Which is not the one that is named here."""
    import importlib

    module = importlib.import_module(script)
    died: list[int] = []

    def die(parent: int) -> None:
        died.append(parent)
        raise SystemExit

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(module, "die_with_parent", die)
        patch.setattr(sys, "argv", [script, "recipe", "--child", "bigtrain", "--parent", "77"])
        with pytest.raises(SystemExit):
            module.main()
        told = stop_at_start(patch)
        if script == "bench_against":
            module.in_process("bigtrain", tiny(bench), seconds=3)
        else:
            with pytest.raises(SystemExit):
                module._in_process(Namespace(recipe="r", overrides=[], work=None, mode="full", steps=1))
    assert died == [77]
    assert told[-1][told[-1].index("--parent") + 1] == str(os.getpid())


def stop_at_start(patch: pytest.MonkeyPatch) -> list[list[str]]:
    """Have processes fail as soon as they are started; return how they are called."""
    told: list[list[str]] = []

    def run(argv: list[str], **_: Any) -> subprocess.CompletedProcess[str]:
        told.append(argv)
        return subprocess.CompletedProcess(argv, 1, "", "")

    patch.setattr(subprocess, "run", run)
    return told


def test_the_facts_have_the_time_of_an_arm(bench: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    seconds: list[Any] = []

    def run(argv: list[str], *, timeout: float, **_: Any) -> None:
        seconds.append(timeout)
        raise subprocess.TimeoutExpired(argv, timeout)

    monkeypatch.setattr(subprocess, "run", run)
    monkeypatch.setattr(sys, "argv", ["bench_against", "--work", "gpt-small-cpu", "--timeout", "400"])
    with pytest.raises(SystemExit, match="nothing was measured: took longer than 400 s"):
        bench.main()
    assert seconds == [400]


def test_the_facts_predict_by_what_they_have_measured(
    bench: Any, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    from arms.facts import facts

    from bigtrain.training import peak

    monkeypatch.setenv("BIGTRAIN_CACHE", str(tmp_path / "cache"))
    rates = (2e9, 1e9, 1e9, 1e9, 1e6)
    monkeypatch.setattr(peak, "measure", lambda *_: dict(zip(peak.MEASURES, rates, strict=True)))
    job = tiny(bench, folder=str(tmp_path), overrides=(*TINY, "train.attention_dropout=0.25"))
    said = facts(job)
    assert (said["rates"], said["measured_flops_per_second"]) == ("measured here", 2e9)
    assert said["predicted_tokens_per_second"] == facts(job)["predicted_tokens_per_second"]
    assert (said["dropout"], said["attention_dropout"]) == (0, 0.25)


@pytest.mark.parametrize(
    ("family", "keys"),
    [
        ("gpt", ("resid_pdrop", "embd_pdrop", "attn_pdrop")),
        ("bert", ("hidden_dropout_prob", "attention_probs_dropout_prob")),
        ("llama", ("attention_dropout",)),
    ],
)
def test_models_that_are_not_shared_drop_what_the_recipe_says(
    bench: Any, family: str, keys: tuple[str, ...], tmp_path: Path
) -> None:
    from arms import trainer

    overrides = (*TINY, *(["model.family=llama"] if family == "llama" else []))
    job = tiny(bench, "bert" if family == "bert" else "gpt", folder=str(tmp_path), overrides=overrides, arm="hf")
    model = trainer._model(job.plan(), job)
    assert [getattr(model.config, key) for key in keys] == [0.0] * len(keys)
    assert getattr(model, "accepts_loss_kwargs", None) is (False if family == "bert" else None)


def test_what_a_result_was_made_with_is_told_without_a_checkout(bench: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    import provenance

    monkeypatch.setattr(provenance, "_git", lambda *_: "")
    monkeypatch.delenv("SOURCES", raising=False)
    monkeypatch.delenv("COMMIT", raising=False)
    found = provenance.provenance()
    assert (found["commit"], found["edited"], "sources" in found) == ("", None, False)
    monkeypatch.setenv("COMMIT", "abc")
    monkeypatch.setenv("SOURCES", "def")
    found = provenance.provenance()
    assert (found["commit"], found["edited"], found["sources"]) == ("abc", None, "def")
    monkeypatch.setattr(provenance, "_git", lambda *arguments: "123" if arguments[0] == "rev-parse" else "")
    found = provenance.provenance()
    assert (found["commit"], found["edited"]) == ("123", False)


@pytest.mark.parametrize(
    ("code", "error", "text"),
    [(1, "torch.OutOfMemoryError: CUDA out of memory", "out of memory"), (-9, "", "out of memory"), (1, "x", "exit 1")],
)
def test_what_does_not_run_says_why(
    bench: Any, monkeypatch: pytest.MonkeyPatch, code: int, error: str, text: str
) -> None:
    monkeypatch.setattr(subprocess, "run", lambda *_, **__: subprocess.CompletedProcess([], code, "", error))
    assert bench.in_process("hf", tiny(bench))["not_run"].startswith(text)


def test_an_arm_whose_library_is_missing_says_so(bench: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    from arms import trainer

    present = {"transformers"}
    monkeypatch.setattr(trainer.importlib.util, "find_spec", lambda name: sys if name in present else None)
    assert bench.run_child("hf-deepspeed", tiny(bench, arm="hf-deepspeed")) == {"not_run": "deepspeed is not installed"}
    present.clear()
    assert bench.run_child("hf", tiny(bench, arm="hf")) == {"not_run": "transformers is not installed"}
    llama = tiny(bench, overrides=(*TINY, "model.family=llama"), arm="plain")
    assert "BERT or GPT-2" in bench.run_child("plain", llama)["not_run"]


def test_every_work_is_a_recipe_and_fits_its_device(bench: Any) -> None:
    import bigtrain
    from bigtrain.planner.hardware import of_name

    for name, work in bench.WORKS.items():
        batch = [f"train.micro_batch_size={work.rows}", f"train.global_batch_size={work.rows * work.accumulation}"]
        recipe = bigtrain.load_recipe(work.recipe, [*work.overrides, *batch, "cluster.devices_per_node=1"])
        plan = bigtrain.plan(recipe, of_name("cpu" if name.endswith(("cpu", "documents")) else "h200"))
        assert plan.micro_batch_size == work.rows, name


def test_model_flops_are_those_of_the_formula(bench: Any) -> None:
    import bigtrain
    from bigtrain.planner.hardware import of_name

    def formula(layers: int, d: int, length: int, head: float) -> float:
        return 6 * layers * (4 * d * d + 8 * d * d) + 12 * layers * length * d + head

    plan = bigtrain.plan(bigtrain.load_recipe("gpt2_124m", ["data.subset=null"]), of_name("h200"), world_size=1)
    assert plan.flops_per_token == formula(12, 768, 1024, 6 * 768 * 50257)
    plan = bigtrain.plan(bigtrain.load_recipe("bert_large", ["data.subset=null"]), of_name("h200"), world_size=1)
    assert plan.flops_per_token == round(formula(24, 1024, 512, 0.15 * 6 * 1024 * (30522 + 1024)))
