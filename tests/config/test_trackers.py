"""Trackers that are not installed are told before anything starts."""

from __future__ import annotations

import pytest

from bigtrain.config import trackers
from bigtrain.config.load import load_recipe
from bigtrain.config.trackers import check_trackers
from bigtrain.errors import RecipeError


def check(monkeypatch: pytest.MonkeyPatch, wanted: str, *, absent: set[str]) -> list[str]:
    monkeypatch.setattr(trackers, "find_spec", lambda name: None if name in absent else object())
    try:
        check_trackers(load_recipe("quickstart_gpt", [f"logging.trackers={wanted}"]))
    except RecipeError as error:
        return [str(fault) for fault in error.faults]
    return []


def test_those_that_are_here_pass(monkeypatch: pytest.MonkeyPatch) -> None:
    assert check(monkeypatch, "[tensorboard, wandb, mlflow, comet]", absent=set()) == []
    assert check(monkeypatch, "[tensorboard]", absent={"accelerate", "wandb"}) == []
    assert check(monkeypatch, "[]", absent={"accelerate", "tensorboard"}) == []


def test_each_that_is_not_is_a_line_with_the_command(monkeypatch: pytest.MonkeyPatch) -> None:
    place = "command line: logging.trackers: "
    assert check(monkeypatch, "[wandb, aim, wandb, comet]", absent={"wandb", "accelerate", "comet_ml"}) == [
        f"{place}'wandb' needs what is not installed: pip install wandb accelerate; or leave it out",
        f"{place}'aim' needs what is not installed: pip install accelerate; or leave it out",
        f"{place}'comet' needs what is not installed: pip install comet_ml accelerate; or leave it out",
    ]
