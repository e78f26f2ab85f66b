"""The evaluation of a finished run: what it refuses."""

from __future__ import annotations

from pathlib import Path

import pytest

import bigtrain
from bigtrain.errors import CheckpointError, InputError
from bigtrain.training.evaluate_run import evaluate_run
from bigtrain.training.metrics import read_metrics

LEAN = (
    *("amp.precision=bf16", "amp.master_weights=split24", "optimizer.state=8bit", "optimizer.gradient_release=true"),
    *("train.max_grad_norm=null", "train.micro_batch_size=8", "recompute.policy=full"),
)


def test_no_run_is_refused(tmp_path: Path) -> None:
    with pytest.raises(CheckpointError, match="holds no checkpoint"):
        evaluate_run(tmp_path)


def test_a_wrong_override_or_source_is_refused(tiny_recipes: dict[str, Path], tmp_path: Path) -> None:
    bigtrain.train(bigtrain.plan(bigtrain.load_recipe(tiny_recipes["gpt"], ["train.steps=1"])), tmp_path / "run")
    with pytest.raises(InputError, match="data.sorce"):
        evaluate_run(tmp_path / "run", ["data.sorce=x"])
    with pytest.raises(InputError, match="no/such/folder"):
        evaluate_run(tmp_path / "run", ["data.source=no/such/folder"])


def test_what_changes_nothing_in_an_evaluation_is_refused(tiny_recipes: dict[str, Path], tmp_path: Path) -> None:
    bigtrain.train(bigtrain.plan(bigtrain.load_recipe(tiny_recipes["gpt"], ["train.steps=1"])), tmp_path / "run")
    with pytest.raises(InputError, match=r"^command line: model.hidden_size: changes nothing in an evaluation"):
        evaluate_run(tmp_path / "run", ["model.hidden_size=64"])


def test_the_tokenizer_is_the_one_of_the_run_even_if_its_data_changed(
    tiny_recipes: dict[str, Path], tmp_path: Path
) -> None:
    texts = tmp_path / "texts.txt"
    texts.write_text("the river falls slowly and the bird sings again\n\n" * 40)
    changes = ["train.steps=1", f"data.source={texts}", "data.validation_fraction=0.3"]
    bigtrain.train(bigtrain.plan(bigtrain.load_recipe(tiny_recipes["gpt"], changes)), tmp_path / "run")
    before = evaluate_run(tmp_path / "run")
    texts.write_text("a wholly different thing is written here today\n\n" * 40)
    after = evaluate_run(tmp_path / "run")
    assert after["eval_labels"] != before["eval_labels"]
    texts.unlink()
    with pytest.raises(InputError, match="no such file"):
        evaluate_run(tmp_path / "run")


@pytest.mark.parametrize("family", ["bert", "gpt"])
def test_a_lean_run_is_evaluated_to_the_numbers_that_it_logged(
    tiny_recipes: dict[str, Path], tmp_path: Path, family: str
) -> None:
    plan = bigtrain.plan(bigtrain.load_recipe(tiny_recipes[family], [*LEAN, "train.steps=7"]))
    bigtrain.train(plan, tmp_path / "run")
    last = [row for row in read_metrics(tmp_path / "run") if "eval_loss" in row][-1]
    again = evaluate_run(tmp_path / "run")
    assert again["step"] == 7
    assert again["eval_loss"] == last["eval_loss"]
    exact = evaluate_run(tmp_path / "run", ["amp.precision=fp32"])
    assert exact["eval_loss"] != again["eval_loss"]
    assert exact["eval_loss"] == pytest.approx(again["eval_loss"], rel=1e-2)
    other_cut = evaluate_run(tmp_path / "run", ["train.micro_batch_size=2"])
    assert other_cut["eval_loss"] == pytest.approx(again["eval_loss"], rel=1e-3)
