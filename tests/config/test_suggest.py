"""A slip in a key finds the key."""

from __future__ import annotations

import random

import pytest

from bigtrain.config.keys import schema_keys, sections
from bigtrain.config.suggest import ELSEWHERE, suggestion

LETTERS = "abcdefghijklmnopqrstuvwxyz_"


def typos(word, rng):
    """Return a word with a letter too many, one too few, and one wrong or swapped with the next."""
    i, j, k = (rng.randrange(len(word)) for _ in range(3))
    wrong = word[:k] + rng.choice(LETTERS) + word[k + 1 :]
    if rng.random() < 0.5 and len(word) > 1:
        k %= len(word) - 1
        wrong = word[:k] + word[k + 1] + word[k] + word[k + 2 :]
    return [word[:i] + rng.choice(LETTERS) + word[i:], word[:j] + word[j + 1 :], wrong]


def test_three_typos_of_every_key_and_section_lead_back():
    rng, tried, lost = random.Random(6), 0, []
    for key in [*schema_keys(), *sections()]:
        section, dot, word = key.rpartition(".")
        in_file = [(f"{section}{dot}{typo}", word, False) for typo in typos(word, rng)]
        typed = [(typo, key, True) for typo in typos(key, rng)]
        for typo, wanted, full in [*in_file, *typed]:
            if typo not in schema_keys() and typo not in sections():
                tried += 1
                lost += [] if f"did you mean {wanted!r}?" in suggestion(typo, full=full) else [(typo, key)]
    assert tried > 450 and len(lost) <= 0.01 * tried, lost


def test_a_right_key_in_a_wrong_section_leads_home():
    lost = []
    for key in schema_keys():
        home, _, word = key.rpartition(".")
        wrong = [section for section in sections() if f"{section}.{word}" not in schema_keys()]
        for other in wrong:
            told = suggestion(f"{other}.{word}")
            if f"belongs to {home!r}" not in told and "belongs to '" not in told and "at the top" not in told:
                lost.append((other, key, told))
    assert len(lost) <= 2, lost


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
        ("train.seed", "; write 'seed' at the top, outside of the sections"),
        ("memory.zzzzzz", "; memory has budget"),
        ("amp.zzzzzz", "; amp has precision, master_weights and reduce"),
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
    assert suggestion("memory." + "x" * 10**6) == "; memory has budget"


@pytest.mark.parametrize("key", ["zzzzzz.qqqqqq", "zzzzzz", "", "."])
def test_what_is_like_nothing_lists_what_there_is(key):
    assert suggestion(key).startswith("; a recipe has name, seed, model, data, ")
