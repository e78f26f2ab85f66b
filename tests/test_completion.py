"""What a shell is offered."""

from __future__ import annotations

import os
import subprocess
import sys

import pytest

from bigtrain import completion
from bigtrain.config.keys import schema_keys


def test_recipes_by_their_beginning() -> None:
    assert completion.complete_recipe("bert_l") == ["bert_large", "bert_large_phase1", "bert_large_phase2"]
    assert "quickstart_gpt" in completion.complete_recipe("")


@pytest.mark.parametrize(
    ("begun", "offered"),
    [
        ("train.st", ["train.steps="]),
        ("sharding.zero_stage=", [f"sharding.zero_stage={word}" for word in ("auto", "0", "1", "2", "3")]),
        ("train.device=c", ["train.device=cpu", "train.device=cuda"]),
        ("train.nothing=", []),
        ("nothing", []),
    ],
)
def test_keys_and_their_words(begun: str, offered: list[str]) -> None:
    assert sorted(completion.complete_override(begun)) == sorted(offered)


def test_every_key_is_offered() -> None:
    assert len(completion.complete_override("")) == len(schema_keys())


def test_devices() -> None:
    assert "h100" in completion.complete_device("h1")
    assert "cpu" in completion.complete_device("")


@pytest.mark.parametrize(
    ("typed", "word"),
    [
        ("bigtrain pla", "plan"),
        ("bigtrain launch quick", "quickstart_gpt"),
        ("bigtrain plan quickstart_gpt optimizer.na", "optimizer.name="),
        ("bigtrain plan quickstart_gpt --device rtx40", "rtx4090"),
    ],
)
def test_a_shell_asks(typed: str, word: str) -> None:
    asked = {
        "_BIGTRAIN_COMPLETE": "complete_bash",
        "COMP_WORDS": typed,
        "COMP_CWORD": str(len(typed.split()) - 1),
    }
    told = subprocess.run(
        [sys.executable, "-m", "bigtrain"], env={**os.environ, **asked}, capture_output=True, text=True, check=False
    )
    assert word in told.stdout.split()
