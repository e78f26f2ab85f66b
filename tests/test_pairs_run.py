"""Runs of the original BERT objective: both losses are told, resumed as uninterrupted, cut as whole."""

from __future__ import annotations

from pathlib import Path

import pytest
from trained import losses, train

PAIRS = (
    "train.objective=mlm_nsp",
    "train.whole_word_masking=true",
    "optimizer.schedule=constant",
    "train.eval_every=4",
    "checkpoint.every_steps=null",
)


@pytest.mark.slow
def test_a_run_of_pairs(tiny_recipes: dict[str, Path], tmp_path: Path) -> None:
    recipe = tiny_recipes["bert"]
    whole = train(recipe, tmp_path / "whole", *PAIRS, "train.steps=8", "optimizer.warmup_steps=0")
    steps = [row for row in whole if "loss" in row]
    assert len(steps) == 8
    assert all(row["loss"] == pytest.approx(row["mlm_loss"] + row["nsp_loss"], rel=1e-6) for row in steps)
    assert steps[-1]["mlm_loss"] < steps[0]["mlm_loss"]
    evaluations = [row for row in whole if "eval_loss" in row]
    assert [row["step"] for row in evaluations] == [4, 8]
    assert all(0 < row["eval_nsp_accuracy"] < 1 and row["eval_nsp_loss"] > 0 for row in evaluations)

    for length in (4, 8):
        resumed = train(recipe, tmp_path / "resumed", *PAIRS, f"train.steps={length}", "optimizer.warmup_steps=0")
    assert losses(resumed) == losses(whole)  # bit by bit, with dropout, masks and pairs
    assert [row for row in resumed if "eval_loss" in row] == evaluations


@pytest.mark.slow
def test_the_micro_batch_changes_no_more_than_the_order_of_sums(tiny_recipes: dict[str, Path], tmp_path: Path) -> None:
    """Rows hold from one pair to several, and the losses are means over pairs and over tokens of the whole batch."""
    cut = {
        micro: losses(
            train(
                tiny_recipes["bert"],
                tmp_path / str(micro),
                *PAIRS,
                "train.steps=4",
                "train.eval_every=null",
                "train.dropout=0",
                "optimizer.warmup_steps=0",
                f"train.micro_batch_size={micro}",
            )
        )
        for micro in (1, 4)
    }
    assert cut[1] == pytest.approx(cut[4], rel=1e-6)
