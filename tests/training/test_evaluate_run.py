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
