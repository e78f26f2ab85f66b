"""What must fit together in a model."""

# ruff: noqa: E501  - lines that users read are tested whole

from __future__ import annotations

import pytest

from bigtrain.config.load import read_recipe
from bigtrain.config.shape_checks import fault, nearest_divisors, shape_faults

RECIPE = b"""\
model: {family: llama, hidden_size: 128, num_hidden_layers: 4, num_attention_heads: 8}
train: {objective: clm, steps: 100}
optimizer: {learning_rate: 1e-3}
data: {sequence_length: 128, vocab_size: 4096}
"""


def found(*overrides):
    return [str(fault) for fault in shape_faults(read_recipe(RECIPE, "r.yaml", overrides))]


def test_a_fitting_recipe_has_no_faults():
    assert found() == []


@pytest.mark.parametrize(
    ("overrides", "line"),
    [
        ("model.preset=lama-7b", "command line: model.preset: unknown preset 'lama-7b'; did you mean 'llama-7b'?"),
        (
            "model.preset=gpt2-xl",
            "command line: model.preset: 'gpt2-xl' is of the family 'gpt', not 'llama', which has llama-7b, llama-13b and llama-70b",
        ),
        (
            "model.hidden_size=null",
            "command line: model.hidden_size: missing; without a preset the shape must be written out",
        ),
        (
            "model.num_attention_heads=5",
            "command line: model.num_attention_heads: 5 does not divide hidden_size, 128; nearest that do: 4, 8",
        ),
        (
            "model.hidden_size=130",
            "command line: model.num_attention_heads: 8 does not divide hidden_size, 130; nearest that do: 5, 10",
        ),
        (
            "model.num_attention_heads=256",
            "command line: model.num_attention_heads: 256 does not divide hidden_size, 128; nearest that do: 128",
        ),
        (
            "model.num_attention_heads=128",
            "command line: model.num_attention_heads: 128 heads of 128 are 1 wide, and rotary positions need an even width",
        ),
        (
            "model.num_key_value_heads=3",
            "command line: model.num_key_value_heads: 3 does not divide num_attention_heads, 8; nearest that do: 2, 4",
        ),
        (
            "model.max_position_embeddings=64",
            "command line: data.sequence_length: 128 is longer than model.max_position_embeddings, 64; "
            "shorten the rows or write auto there",
        ),
        (
            "model.vocab_size=4095",
            "command line: model.vocab_size: 4095 is smaller than the tokenizer's data.vocab_size, 4096; use auto or at least 4096",
        ),
        (
            "data.vocab_size=5000 model.vocab_size=4500",
            "command line: model.vocab_size: 4500 is smaller than the tokenizer's data.vocab_size, 5000; "
            "use auto or at least 5000",
        ),
        (
            "recompute.policy=[full,none]",
            "command line: recompute.policy: a list of 2 for 4 blocks; write one entry a block, or one word for all",
        ),
        (
            "model.family=gpt model.num_key_value_heads=4",
            "command line: model.num_key_value_heads: 4: only the family llama groups heads; leave it out or write 8",
        ),
        (
            "model.family=bert model.rope_theta=5e5",
            "command line: model.rope_theta: only the family llama has rotary positions; leave it out for bert",
        ),
    ],
)
def test_faults(overrides, line):
    assert found(*overrides.split()) == [line]


@pytest.mark.parametrize(
    "overrides",
    [
        "model.num_key_value_heads=2",
        "model.family=gpt model.num_key_value_heads=8",
        "model.vocab_size=8192",
        "model.rope_theta=5e5",
        "data.tokenizer=gpt2 model.vocab_size=100",
        "recompute.policy=[none,none,full,full]",
        "model.max_position_embeddings=128",
        "model.preset=llama-7b model.num_attention_heads=16 model.hidden_size=1024",
    ],
)
def test_no_faults(overrides):
    assert found(*overrides.split()) == []


def test_all_at_once():
    assert len(found("model.num_attention_heads=5", "model.max_position_embeddings=64", "model.vocab_size=10")) == 3
    assert len(found("model.hidden_size=null", "model.num_hidden_layers=null")) == 2


def test_a_fault_stands_where_it_was_typed():
    recipe = read_recipe(RECIPE, "r.yaml", ["model.hidden_size=130"])
    assert fault(recipe, "model.num_attention_heads", "x", "model.hidden_size").where == "command line"
    assert fault(recipe, "model.num_attention_heads", "x").where == "r.yaml:1"
    assert fault(recipe, "model.preset", "x", "data.split").where == "r.yaml:1"
    assert fault(recipe, "amp.precision", "x").where == "r.yaml"


@pytest.mark.parametrize(
    ("number", "wanted", "text"),
    [(128, 5, "4, 8"), (128, 1, "1, 2"), (7, 3, "1, 7"), (7, 9, "7"), (10**18 + 9, 10**9, ""), (2**62, 3, "2, 4")],
)
def test_nearest_divisors(number, wanted, text):
    assert nearest_divisors(number, wanted) == text
