"""What docs/accelerate.md shows works as written, on one process and on two."""

from __future__ import annotations

import json
import os
import re
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
from group import told_by_all
from ranks_of_docs import PAGE, changed, follow_accelerate, follow_engine, follow_planned_model, loops

import bigtrain
from bigtrain.memory.measure import measure

ROOT = PAGE.parents[1]
RANKS = ROOT / "tests" / "shared" / "ranks_of_docs.py"
STEPS = 4
TOLERANCE = 1e-5
WHOLE_BATCH = ("batch_size=4", "batch_size=8")
"""What one process reads where two read halves."""


@pytest.fixture(scope="module")
def recipe(tmp_path_factory: pytest.TempPathFactory, corpus_file: Path) -> str:
    path = tmp_path_factory.mktemp("docs") / "tiny.yaml"
    path.write_text(
        "model: {family: gpt, hidden_size: 32, num_hidden_layers: 2, num_attention_heads: 2}\n"
        f"data: {{source: {corpus_file}, vocab_size: 300, sequence_length: 32, validation_fraction: 0.1}}\n"
        "train: {objective: clm, global_batch_size: 8, micro_batch_size: 2, steps: 4, dropout: 0, device: cpu}\n"
        "optimizer: {learning_rate: 1e-2, warmup_steps: 10%}\n"
        "sharding: {zero_stage: 2}\n"
        "logging: {every_steps: 1, trackers: []}\n"
    )
    return str(path)


@pytest.fixture(scope="module")
def launched(recipe: str, tmp_path_factory: pytest.TempPathFactory) -> list[float]:
    """Return the losses of the shipped loop on two processes."""
    run = tmp_path_factory.mktemp("launched") / "run"
    assert bigtrain.launch(bigtrain.plan(bigtrain.load_recipe(recipe, ["cluster.devices_per_node=2"])), run) == 0
    rows = [json.loads(line) for line in (run / "metrics.jsonl").read_text().splitlines()]
    return [row["loss"] for row in rows if "loss" in row]


@pytest.fixture(scope="module")
def two_ranks(recipe: str, launched: list[float]) -> dict[str, Any]:
    """Return what the page's loops found on two processes, the data prepared by then."""
    (found,), nothing = told_by_all([RANKS, recipe, STEPS], 2)
    assert not nothing
    return dict(found)


@pytest.fixture(autouse=True)
def same_environment() -> Iterator[None]:
    """Put the environment back after a test: Accelerate writes into it, and reads it the next time."""
    before = dict(os.environ)
    yield
    os.environ.clear()
    os.environ.update(before)


def losses(names: dict[str, Any]) -> torch.Tensor:
    return torch.stack(names["losses"])


@pytest.mark.usefixtures("torch_seed")
@pytest.mark.parametrize("precision", ["fp32", "bf16"])
def test_recompute_changes_no_bit_of_accelerates_losses_and_saves_memory(precision: str) -> None:
    found: dict[str, torch.Tensor] = {}
    peaks: dict[str, int] = {}
    for policy in ("none", "selective", "full"):

        def run(policy: str = policy) -> None:
            found[policy] = losses(follow_accelerate(policy, precision, WHOLE_BATCH, dropout=0.1))

        peaks[policy] = measure(run).peak_bytes
    assert torch.equal(found["none"], found["selective"])
    assert torch.equal(found["none"], found["full"])
    assert found["none"].unique().numel() == STEPS
    assert peaks["full"] < peaks["selective"] < 0.85 * peaks["none"]


@pytest.mark.usefixtures("torch_seed")
def test_low_precision_comes_from_amp_and_not_from_accelerate() -> None:
    exact, low = (follow_accelerate("none", precision, WHOLE_BATCH) for precision in ("fp32", "bf16"))
    assert low["accelerator"].mixed_precision == "no"
    assert not torch.equal(losses(exact), losses(low))
    torch.testing.assert_close(losses(low), losses(exact), rtol=1e-3, atol=0)
    seen: list[torch.dtype] = []
    low["model"].transformer.h[0].mlp.register_forward_hook(lambda _module, _args, out: seen.append(out.dtype))
    low["model"](low["rows"][0]["input_ids"][None])
    assert seen == [torch.bfloat16]
    assert {p.dtype for p in low["model"].parameters()} == {torch.float32}


@pytest.mark.slow
def test_a_loop_of_ones_own_needs_no_launcher(recipe: str, launched: list[float]) -> None:
    names = follow_engine(recipe, STEPS)
    assert names["world"].size == 1
    assert names["losses"] == pytest.approx(launched, rel=TOLERANCE)


@pytest.mark.slow
@pytest.mark.skipif(torch.cuda.is_available(), reason="what Accelerate does where there is no GPU")
def test_processes_that_accelerate_leaves_alone_are_refused(two_ranks: dict[str, Any]) -> None:
    assert two_ranks["refused"] == "2 processes, and Accelerate trains a GPT2LMHeadModel on 1"


@pytest.mark.slow
def test_a_model_that_no_recipe_describes_on_two_processes(two_ranks: dict[str, Any]) -> None:
    assert two_ranks["planned"] == pytest.approx(follow_planned_model(), rel=TOLERANCE)


@pytest.mark.slow
def test_accelerates_loop_on_two_processes_is_that_of_one(two_ranks: dict[str, Any]) -> None:
    assert two_ranks["plain"] == two_ranks["full"]
    assert two_ranks["plain wrapped in"] == two_ranks["bf16 wrapped in"] == "DistributedDataParallel"
    assert two_ranks["plain"] == pytest.approx(
        losses(follow_accelerate("none", "fp32", WHOLE_BATCH)).tolist(), rel=TOLERANCE
    )
    assert two_ranks["bf16"] == pytest.approx(two_ranks["plain"], rel=1e-3)
    assert two_ranks["bf16"] != two_ranks["plain"]


@pytest.mark.slow
def test_a_loop_of_ones_own_on_two_processes_is_the_shipped_one(
    two_ranks: dict[str, Any], launched: list[float]
) -> None:
    assert two_ranks["engine"] == launched
    assert len(launched) == STEPS


@pytest.mark.parametrize("shown", ["recipes/absent.yaml", "for "])
def test_a_change_must_have_one_place(shown: str) -> None:
    with pytest.raises(AssertionError):
        changed(loops()[1], (shown, "other"))


def test_every_file_that_is_named_is_there() -> None:
    text = PAGE.read_text(encoding="utf-8")
    for link in re.findall(r"\]\(([^)#]+)\)", text):
        assert (PAGE.parent / link).is_file(), link
    for name in re.findall(r"(?:recipes|tests)/\w+\.\w+", text):
        assert (ROOT / name).is_file(), name
