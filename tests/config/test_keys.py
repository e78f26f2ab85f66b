"""The schema as a table."""

from __future__ import annotations

import pytest

from bigtrain.config.keys import (
    LONGEST_SHOWN,
    choices,
    expects,
    listed,
    nullable,
    quoted,
    schema_keys,
    sections,
    show,
    takes,
    words_of,
)

SECTIONS = [
    "model",
    "data",
    "train",
    "optimizer",
    "amp",
    "recompute",
    "sharding",
    "memory",
    "checkpoint",
    "logging",
    "cluster",
]


def test_sections_in_their_order():
    assert list(sections()) == SECTIONS


def test_schema_keys_start_with_the_recipe_itself():
    keys = list(schema_keys())
    assert keys[:3] == ["name", "seed", "model.family"]
    assert "train" not in keys and len(keys) > 60


def test_words_of_a_section_and_of_the_top():
    assert words_of("memory") == ["budget"]
    assert words_of("") == ["name", "seed", *SECTIONS]


@pytest.mark.parametrize("key", schema_keys())
def test_every_key_says_what_it_expects(key):
    assert expects(key)


@pytest.mark.parametrize(
    ("key", "text"),
    [
        ("seed", "a whole number of 0 or more"),
        ("model.family", "'bert', 'gpt' or 'llama'"),
        ("train.compile", "'auto', or true or false"),
        ("train.max_grad_norm", "a number above 0, or null"),
        ("sharding.zero_stage", "'auto', 0, 1, 2 or 3"),
        ("memory.budget", "'auto', or bytes with a unit, such as 16GiB or 80GB"),
        ("data.source", "text, or a list of text"),
    ],
)
def test_expects(key, text):
    assert expects(key) == text


def test_nullable():
    assert nullable("train.steps") and nullable("model.preset")
    assert not nullable("train.micro_batch_size") and not nullable("seed")


def test_choices_hold_those_of_lists():
    assert choices("recompute.policy") == ["none", "selective", "full", "offload", "auto"]
    assert choices("seed") == []


def test_takes():
    assert takes("train.compile", bool) and not takes("train.device", bool)


@pytest.mark.parametrize(
    ("key", "value", "text"),
    [
        ("seed", 5, "5"),
        ("data.packing", False, "false"),
        ("model.preset", None, "null"),
        ("data.split", "a", "'a'"),
        ("memory.budget", 2**34, "16GiB"),
        ("cluster.timeout", 90.0, "90s"),
        ("optimizer.betas", [0.9, 1], "[0.9, 1]"),
        ("train", {"a": 1}, "a mapping"),
        ("train", 7, "7"),
        ("data.split", "a\nb", "'a\\nb'"),
    ],
)
def test_show(key, value, text):
    assert show(key, value) == text


def test_long_values_are_cut():
    assert len(show("data.split", "x" * 10**6)) <= LONGEST_SHOWN
    assert len(show("data.source", ["x" * 50] * 10**4)) <= LONGEST_SHOWN
    assert len(quoted("x" * 10**6)) <= LONGEST_SHOWN + 2


def test_listed():
    assert listed(["a"]) == "a"
    assert listed(["a", "b", "c"]) == "a, b or c"
    assert listed(["a", "b"], "and") == "a and b"
