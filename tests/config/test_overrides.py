"""`section.key=value` over a file."""

from __future__ import annotations

import pytest

from bigtrain.config.load import read_recipe
from bigtrain.errors import RecipeError

RECIPE = b"""\
model: {family: bert, preset: bert-base}
train:
  objective: mlm
  tokens: 1M
  micro_batch_size: 4
  max_grad_norm: 2.0
optimizer: {learning_rate: 1e-3}
"""


def read(*overrides):
    return read_recipe(RECIPE, "r.yaml", overrides, name="r")


def fault(*overrides):
    with pytest.raises(RecipeError) as error:
        read(*overrides)
    (only,) = error.value.faults
    assert only.where == "command line"
    return only.key, only.text


@pytest.mark.parametrize(
    ("override", "key", "value"),
    [
        ("train.micro_batch_size=8", "micro_batch_size", 8),
        (" train.micro_batch_size = 8 ", "micro_batch_size", 8),
        ("train.micro_batch_size=auto", "micro_batch_size", "auto"),
        ("train.global_batch_size=1K", "global_batch_size", 1000),
        ("train.init_from=runs/a=b", "init_from", "runs/a=b"),
        ("train.init_from='5'", "init_from", "5"),
        ("train.compile=false", "compile", False),
        ("train.dropout=1e-1", "dropout", 0.1),
        ("train.max_grad_norm=null", "max_grad_norm", None),
        ("train.max_grad_norm=", "max_grad_norm", None),
        ("train.micro_batch_size=null", "micro_batch_size", "auto"),
        ("train.eval_rows=null", "eval_rows", None),
    ],
)
def test_values(override, key, value):
    recipe = read(override)
    assert getattr(recipe.train, key) == value


def test_lists_mappings_and_top_level_keys():
    recipe = read("optimizer.betas=[0.8, 0.9]", "amp={precision: bf16}", "seed=7", "name=other")
    assert (recipe.optimizer.betas, recipe.amp.precision, recipe.seed, recipe.name) == ([0.8, 0.9], "bf16", 7, "other")
    assert recipe.origin("amp.precision") == "command line"


def test_through_a_section_that_the_file_lacks():
    recipe = read("data.sequence_length=64")
    assert recipe.data.sequence_length == 64
    assert recipe.origin("data.sequence_length") == "command line"
    assert recipe.origin("data.source") == "r.yaml"


def test_the_last_of_repeated_ones_wins():
    assert read("seed=1", "seed=2").seed == 2
    assert read("seed=x", "seed=2").seed == 2
    assert read("amp.precision=fp16", "amp={}").amp.precision == "fp32"
    assert read("amp.precision=fp16", "amp={}", "amp.precision=bf16").amp.precision == "bf16"


@pytest.mark.parametrize("length", ["steps", "epochs"])
def test_a_length_takes_the_place_of_the_files(length):
    recipe = read(f"train.{length}=3")
    assert getattr(recipe.train, length) == 3 and recipe.train.tokens is None
    assert not recipe.writes("train.tokens")


def test_unsetting_a_length_leaves_the_others():
    assert read("train.steps=null").train.tokens == 1_000_000
    assert read("train.tokens=null", "train.steps=9").train.steps == 9
    assert read("train.tokens=null").train.tokens is None


def test_origin_of_an_unset_key_is_forgotten():
    assert not read("train.micro_batch_size=null").writes("train.micro_batch_size")


@pytest.mark.parametrize(
    ("override", "key", "words"),
    [
        ("train.steps", "train.steps", "an override is written key=value"),
        ("=5", "=5", "an override is written key=value"),
        ("a\nb", "'a\\nb'", "an override is written key=value"),
        ("micro_batch_size=4", "micro_batch_size", "did you mean 'train.micro_batch_size'?"),
        ("train.micro_batchsize=4", "train.micro_batchsize", "did you mean 'train.micro_batch_size'?"),
        ("train.steps.x=4", "train.steps.x", "unknown key"),
        ("train.seed=4", "train.seed", "did you mean 'seed'?"),
        ("a\nb=4", "'a\\nb'", "unknown key"),
        ("seed=[", "seed", "broken YAML"),
        ("data.source=*.txt", "data.source", "broken YAML"),
        ("data.source=*txt", "data.source", "quote it if it is text"),
        ("data.source=!x", "data.source", "quote it if it is text"),
        ("amp={precision: fp32, precision: bf16}", "amp.precision", "given twice"),
        ("train=5", "train", "5 is not a section"),
        ("train.steps=eight", "train.steps", "'eight' is not a whole number of 1 or more, or null"),
        ("amp={precison: bf16}", "amp.precison", "did you mean 'precision'?"),
    ],
)
def test_faults(override, key, words):
    got, text = fault(override)
    assert got == key and words in text


def test_a_section_that_is_none_is_refused_once():
    with pytest.raises(RecipeError, match="is not a section") as error:
        read_recipe(RECIPE + b"amp: 5\n", "r.yaml", ["amp.precision=bf16"])
    assert len(error.value.faults) == 1


def test_null_restores_a_required_section_to_missing():
    with pytest.raises(RecipeError, match="optimizer: missing section; it needs 'learning_rate'"):
        read("optimizer=null")
