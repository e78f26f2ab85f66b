"""Samples during training: written, repeatable, and without a trace in the run."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
from rank_trains import train_all
from trained import losses, train

from bigtrain.training.metrics import read_metrics
from bigtrain.training.samples import SAMPLES_FILE, describe_sample, flat

SHORT = ("train.steps=6", "train.eval_every=null", "checkpoint.every_steps=3")
SAMPLED = (*SHORT, "logging.sample_every=2")


def samples(folder: Path) -> list[dict[str, object]]:
    return [json.loads(line) for line in (folder / SAMPLES_FILE).read_text(encoding="utf-8").splitlines()]


@pytest.mark.parametrize("family", ["gpt", "bert"])
def test_a_run_with_samples_has_the_losses_of_one_without(tiny_recipes, tmp_path, family, capsys):
    plain = train(tiny_recipes[family], tmp_path / "plain", *SHORT)
    sampled = train(tiny_recipes[family], tmp_path / "sampled", *SAMPLED, "logging.trackers=[tensorboard]")
    assert losses(sampled) == losses(plain)
    assert not (tmp_path / "plain" / SAMPLES_FILE).exists()
    rows = samples(tmp_path / "sampled")
    assert [row["step"] for row in rows] == ([2, 2, 4, 4, 6, 6] if family == "gpt" else [2, 4, 6])
    assert len({row["prompt"] for row in rows}) == (2 if family == "gpt" else 1)
    for row in rows:
        if family == "gpt":
            assert row["text"].startswith(row["prompt"])
        else:
            assert row["prompt"].count("[MASK]") == row["masked"] >= row["right"]
            assert row["text"] != row["prompt"]
    assert sum("sample at step" in line for line in capsys.readouterr().out.splitlines()) == 3


def test_going_on_writes_the_samples_of_a_run_that_was_not_stopped(tiny_recipes, tmp_path):
    level = (*SAMPLED, "optimizer.schedule=constant", "optimizer.warmup_steps=0")
    train(tiny_recipes["gpt"], tmp_path / "whole", *level)
    part = tmp_path / "part"
    train(tiny_recipes["gpt"], part, *level, "train.steps=3")
    with (part / SAMPLES_FILE).open("a") as file:
        file.write('{"step": 4, "prompt": "of work that was lost", "text": ""}\n{"step": 4, "pro')
    train(tiny_recipes["gpt"], part, *level)
    assert samples(part) == samples(tmp_path / "whole")


@pytest.mark.slow
def test_ranks_that_share_the_weights_sample_together(tiny_recipes, tmp_path):
    shared = ["cluster.devices_per_node=2", "sharding.zero_stage=3"]
    cases = [
        {"recipe": str(tiny_recipes["gpt"]), "overrides": [*overrides, *shared], "folder": str(tmp_path / name)}
        for name, overrides in (("plain", SHORT), ("sampled", SAMPLED))
    ]
    told = train_all(cases, 2, tmp_path)
    assert told == [[{"ended": None}] * 2] * 2
    assert losses(read_metrics(tmp_path / "sampled")) == losses(read_metrics(tmp_path / "plain"))
    assert [row["step"] for row in samples(tmp_path / "sampled")] == [2, 2, 4, 4, 6, 6]


def test_texts_lie_end_to_end():
    row = flat([[5, 6, 7], [8]])
    assert row["input_ids"].tolist() == [5, 6, 7, 8]
    assert row["position_ids"].tolist() == [0, 1, 2, 0]
    assert row["cu_seqlens"].tolist() == [0, 3, 4]
    assert row["max_seqlen"] == 3


def test_the_line_for_people_is_one_line():
    row = {"step": 4, "prompt": "a", "text": "a\n b", "masked": 3, "right": 1}
    assert describe_sample([row]) == "sample at step 4, 1 of 3 right: a b"
