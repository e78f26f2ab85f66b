"""The evaluation of a finished run: what it refuses."""

from __future__ import annotations

from pathlib import Path

import pytest

import bigtrain
from bigtrain.errors import CheckpointError, InputError
from bigtrain.training.evaluate_run import evaluate_run


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
