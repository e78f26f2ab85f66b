"""Evaluation: exact means, beside what token frequencies alone give."""

from __future__ import annotations

import math
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from torch import Tensor, nn

from bigtrain.errors import DataError
from bigtrain.training.evaluate import Evaluation, PairScore, evaluate


class Fixed(nn.Module):
    """Answers as told: each call's sum of losses, right answers and labels."""

    def __init__(self) -> None:
        super().__init__()
        self.modes: list[bool] = []

    def evaluate(self, labels: Tensor, **_: Any) -> tuple[Tensor, Tensor, Tensor]:
        self.modes.append(self.training)
        counted = labels[labels != -100]
        return counted.double().sum(), (counted == 1).sum(), torch.tensor(len(counted))


def batch(labels: list[int]) -> dict[str, Tensor]:
    return {
        "input_ids": torch.zeros(1, 4, dtype=torch.int64),
        "labels": torch.tensor([labels + [-100] * (4 - len(labels))]),
        "document_lengths": torch.tensor([[4]], dtype=torch.int32),
    }


SURPRISAL = np.array([0.5, 1.0, 2.0, 4.0])
CPU = torch.device("cpu")


def test_means_are_over_all_labels_not_over_batches() -> None:
    found = evaluate(Fixed(), [batch([1, 1, 3]), batch([2])], SURPRISAL, CPU)
    assert found.loss == pytest.approx(7 / 4)
    assert found.accuracy == pytest.approx(2 / 4)
    assert found.unigram_loss == pytest.approx((1 + 1 + 4 + 2) / 4)
    assert found.labels == 4


@pytest.mark.parametrize("training", [True, False])
def test_the_model_is_in_evaluation_mode_and_put_back(training: bool) -> None:
    model = Fixed().train(training)
    evaluate(model, [batch([1])], SURPRISAL, CPU)
    assert model.modes == [False]
    assert model.training is training


def test_no_label_at_all_is_refused() -> None:
    with pytest.raises(DataError, match="validation_fraction"):
        evaluate(Fixed(), [], SURPRISAL, CPU)


def test_the_row_and_perplexity() -> None:
    row = Evaluation(loss=2.0, accuracy=0.25, unigram_loss=3.0, labels=8).row()
    assert row["eval_loss"] == 2.0
    assert row["eval_accuracy"] == 0.25
    assert row["eval_unigram_loss"] == 3.0
    assert row["eval_perplexity"] == pytest.approx(math.e**2)
    assert math.isfinite(Evaluation(1e6, 0, 0, 1).perplexity)


def test_pairs_are_counted_by_themselves() -> None:
    class Pairs(Fixed):
        def evaluate(self, labels: Tensor, **_: Any) -> tuple[Tensor, ...]:  # type: ignore[override]
            return *(found := super().evaluate(labels)), found[0], torch.tensor(1), torch.tensor(2)

    found = evaluate(Pairs(), [batch([1, 1, 3]), batch([2])], SURPRISAL, CPU)
    assert found.pairs == PairScore(loss=7 / 4, accuracy=2 / 4)
    assert found.loss == pytest.approx(7 / 4)
    assert {"eval_nsp_loss": 1.75, "eval_nsp_accuracy": 0.5}.items() <= found.row().items()
    assert "eval_nsp_loss" not in evaluate(Fixed(), [batch([1])], SURPRISAL, CPU).row()


def test_a_run_is_evaluated_again_to_the_same_numbers(tiny_recipes: dict[str, Path], tmp_path: Path) -> None:
    import bigtrain
    from bigtrain.training.evaluate_run import evaluate_run
    from bigtrain.training.metrics import read_metrics

    bigtrain.train(bigtrain.plan(bigtrain.load_recipe(tiny_recipes["bert"])), tmp_path / "run")
    last = [row for row in read_metrics(tmp_path / "run") if "eval_loss" in row][-1]
    again = evaluate_run(tmp_path / "run")
    assert again["eval_loss"] == last["eval_loss"]
    assert again["step"] == 12
    assert evaluate_run(tmp_path / "run" / "step-00000005")["eval_loss"] != last["eval_loss"]


def test_a_run_is_evaluated_on_other_data(tiny_recipes: dict[str, Path], tmp_path: Path) -> None:
    import bigtrain
    from bigtrain.training.evaluate_run import evaluate_run

    bigtrain.train(bigtrain.plan(bigtrain.load_recipe(tiny_recipes["gpt"], ["train.steps=2"])), tmp_path / "run")
    other = tmp_path / "other.txt"
    other.write_text("again and again the river grows slowly\n\n" * 50)
    overrides = [f"data.source={other}", "data.validation_fraction=0.5"]
    assert evaluate_run(tmp_path / "run", overrides)["eval_loss"] != evaluate_run(tmp_path / "run")["eval_loss"]
