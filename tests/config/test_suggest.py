"""A slip in a key finds the key."""

from __future__ import annotations

import random

import pytest

from bigtrain.config.keys import schema_keys
from bigtrain.config.suggest import ELSEWHERE, meant_key, suggestion

LETTERS = "abcdefghijklmnopqrstuvwxyz"


def one_edit(word: str, rng: random.Random) -> str:
    i = rng.randrange(len(word) - 1)
    letter = rng.choice(LETTERS)
    return rng.choice(
        [
            word[:i] + word[i + 1 :],
            word[:i] + letter + word[i:],
            word[:i] + letter + word[i + 1 :],
            word[:i] + word[i + 1] + word[i] + word[i + 2 :],
        ]
    )


@pytest.mark.parametrize("full", [False, True])
def test_three_typos_of_every_key(full):
    rng, wrong, tried = random.Random(7), [], 0
    for key in schema_keys():
        section, dot, word = key.rpartition(".")
        typos: set[str] = set()
        while len(typos) < 3:
            typos.add(f"{section}{dot}{one_edit(word, rng)}")
            typos -= set(schema_keys())
        tried += 3
        want = key if full else word
        wrong += [(typo, key) for typo in typos if f"'{want}'?" not in suggestion(typo, full=full)]
    assert len(wrong) <= 0.05 * tried, wrong


def test_typos_of_sections():
    rng, wrong, tried = random.Random(3), [], 0
    for key in schema_keys():
        section, _, word = key.rpartition(".")
        if section:
            tried += 1
            typo = one_edit(section, rng)
            wrong += [(typo, key)] if typo != section and meant_key(f"{typo}.{word}") != key else []
    assert len(wrong) <= 0.05 * tried, wrong


def test_names_of_other_tools_lead_to_keys_that_exist():
    for name, target in ELSEWHERE.items():
        assert " " in target or target in schema_keys(), name
        assert name not in {key.rpartition(".")[2] for key in schema_keys()}, f"{name} is a key here"


@pytest.mark.parametrize(
    ("key", "text"),
    [
        ("amp.precison", "; did you mean 'precision'?"),
        ("trian", "; did you mean 'train'?"),
        ("model.n_embd", "; did you mean 'hidden_size'?"),
        ("model.n_positions", "; did you mean 'max_position_embeddings'?"),
        ("train.per_device_train_batch_size", "; did you mean 'micro_batch_size'?"),
        ("train.lr", "; did you mean 'optimizer.learning_rate'?"),
        ("train.max_seq_length", "; did you mean 'data.sequence_length'?"),
        ("train.fp16", "; did you mean 'amp.precision'?"),
        ("amp.bf16", "; did you mean 'precision'?"),
        ("train.learning_rate", "; it belongs to 'optimizer'"),
        ("dropout", "; it belongs to 'train'"),
        ("every_steps", "; it belongs to 'checkpoint' or 'logging'"),
        ("train.zzzzzz", ""),
        ("zzzzzz.qqqqqq", ""),
    ],
)
def test_suggestion_in_a_file(key, text):
    assert suggestion(key) == text


@pytest.mark.parametrize(
    ("key", "meant"),
    [
        ("micro_batch_size", "train.micro_batch_size"),
        ("lr", "optimizer.learning_rate"),
        ("trian.steps", "train.steps"),
        ("optim.lr", "optimizer.learning_rate"),
        ("train.micro_batchsize", "train.micro_batch_size"),
        ("optimizer.stage", "optimizer.state"),
        ("sharding.stage", "sharding.zero_stage"),
    ],
)
def test_suggestion_for_an_override(key, meant):
    assert suggestion(key, full=True) == f"; did you mean {meant!r}?"


def test_what_is_derived_is_explained():
    assert "follows from train.global_batch_size" in suggestion("train.gradient_accumulation_steps")
    assert "--run-dir" in suggestion("output_dir")


def test_endless_keys_are_quick():
    assert suggestion("train." + "x" * 10**6) == ""
