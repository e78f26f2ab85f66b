"""Each way to write a recipe wrongly: one line, with place, key, value and what to write."""

# ruff: noqa: E501  - lines that users read are tested whole

from __future__ import annotations

import pytest

from bigtrain.config.load import read_recipe
from bigtrain.errors import RecipeError

RECIPE = """\
name: r
model:
  family: bert
train:
  objective: mlm
optimizer:
  learning_rate: 1e-3
"""


def faults(text, *overrides):
    with pytest.raises(RecipeError) as error:
        read_recipe(text.encode(), "r.yaml", overrides)
    assert all(line.isprintable() for line in str(error.value).splitlines())
    assert len(str(error.value).splitlines()) == len(error.value.faults)
    return str(error.value).splitlines()


@pytest.mark.parametrize(
    ("more", "line"),
    [
        ("amp: {precison: bf16}", "r.yaml:8: amp.precison: unknown key; did you mean 'precision'?"),
        ("amp:\n  dropout: 0.1", "r.yaml:9: amp.dropout: unknown key; it belongs to 'train'"),
        ("sede: 5", "r.yaml:8: sede: unknown key; did you mean 'seed'?"),
        ("steps: 5", "r.yaml:8: steps: unknown key; it belongs to 'train'"),
        ("train.steps: 5", "r.yaml:8: train.steps: unknown key; write 'steps' below 'train'"),
        (
            "amp: {precision: bf61}",
            "r.yaml:8: amp.precision: 'bf61' is not 'fp32', 'bf16', 'fp16' or 'fp8'; did you mean 'bf16'?",
        ),
        ("amp: {precision: 16}", "r.yaml:8: amp.precision: 16 is not 'fp32', 'bf16', 'fp16' or 'fp8'"),
        ("amp: {precision: null}", "r.yaml:8: amp.precision: null is not 'fp32', 'bf16', 'fp16' or 'fp8'"),
        ("amp: [bf16]", "r.yaml:8: amp: ['bf16'] is not a section; write its keys below it, such as 'precision'"),
        ("amp: bf16", "r.yaml:8: amp: 'bf16' is not a section; write its keys below it, such as 'precision'"),
        ("memory: {budget: 24}", "r.yaml:8: memory.budget: 24 has no unit; write for example '24GiB'"),
        ("memory: {budget: '24'}", "r.yaml:8: memory.budget: '24' has no unit of bytes; write for example '24GiB'"),
        (
            "memory: {budget: lots}",
            "r.yaml:8: memory.budget: 'lots' is not 'auto', or bytes with a unit, such as 16GiB or 80GB",
        ),
        (
            "memory: {budget: aut}",
            "r.yaml:8: memory.budget: 'aut' is not 'auto', or bytes with a unit, such as 16GiB or 80GB; did you mean 'auto'?",
        ),
        ("data: {packing: no}", "r.yaml:8: data.packing: 'no' is not true or false; write false"),
        ("data: {packing: 1}", "r.yaml:8: data.packing: 1 is not true or false"),
        ("data: {sequence_length: 1:30}", "r.yaml:8: data.sequence_length: '1:30' is not a whole number of 1 or more"),
        ("data: {sequence_length: 128.0}", "r.yaml:8: data.sequence_length: 128.0 is not a whole number; write 128"),
        (
            "data: {subset: 20231101}",
            "r.yaml:8: data.subset: 20231101 is not text, or null; write it in quotes: '20231101'",
        ),
        ("data: {source: []}", "r.yaml:8: data.source: [] is not text, or a list of text"),
        ("data: {source: [a, 5]}", "r.yaml:8: data.source: ['a', 5] is not text, or a list of text"),
        ("data: {source: {a: b}}", "r.yaml:8: data.source: a mapping is not text, or a list of text"),
        (
            "seed: 99999999999999999999",
            "r.yaml:8: seed: 99999999999999999999 is too large; at most 9223372036854775807",
        ),
        ("seed: -1", "r.yaml:8: seed: -1 is not a whole number of 0 or more"),
        ("cluster: {timeout: 60}", "r.yaml:8: cluster.timeout: 60 has no unit; write for example '60s'"),
        (
            "cluster: {nodes: 2-4}",
            "r.yaml:8: cluster.nodes: '2-4' is not a whole number of 1 or more, or least:most, such as 2:4",
        ),
        ("sharding: {zero_stage: true}", "r.yaml:8: sharding.zero_stage: true is not a stage; write 0, 1, 2 or 3"),
        (
            "recompute: {policy: [ful]}",
            "r.yaml:8: recompute.policy: ['ful'] is not 'none', 'selective', 'full', 'offload' or 'auto', "
            "or a list of 'none', 'selective', 'full' or 'offload'; did you mean 'full'?",
        ),
        (
            "logging: {trackers: tensorboard}",
            "r.yaml:8: logging.trackers: 'tensorboard' is not a list of 'tensorboard', 'wandb', "
            "'mlflow', 'trackio', 'aim', 'swanlab' or 'comet'",
        ),
        ("checkpoint: {keep: 1}", "r.yaml:8: checkpoint.keep: 1 is not a whole number of 2 or more"),
    ],
)
def test_one_line(more, line):
    assert faults(f"{RECIPE}{more}\n") == [line]


@pytest.mark.parametrize(
    ("old", "new", "line"),
    [
        ("  family: bert", "  preset: bert-base", "r.yaml:2: model.family: missing; write 'bert', 'gpt' or 'llama'"),
        ("train:\n  objective: mlm\n", "", "r.yaml: train: missing section; it needs 'objective'"),
        ("  objective: mlm", "  objectve: mlm", "r.yaml:5: train.objectve: unknown key; did you mean 'objective'?"),
        ("train:", "trian:", "r.yaml:4: trian: unknown key; did you mean 'train'?"),
        ("learning_rate: 1e-3", "lr: 1e-3", "r.yaml:7: optimizer.lr: unknown key; did you mean 'learning_rate'?"),
        (
            "name: r",
            "name: my run",
            "r.yaml:1: name: 'my run' is not a name of letters, digits, '.', '_' and '-' that starts with a letter or digit",
        ),
        (
            "name: r",
            "name: 7",
            "r.yaml:1: name: 7 is not a name of letters, digits, '.', '_' and '-' that starts with a letter or digit; "
            "write it in quotes: '7'",
        ),
        ("1e-3", "-1", "r.yaml:7: optimizer.learning_rate: -1 is not a number of 0 or more"),
        ("1e-3", "1e999", "r.yaml:7: optimizer.learning_rate: inf is not a number of 0 or more"),
        ("1e-3", ".nan", "r.yaml:7: optimizer.learning_rate: nan is not a number of 0 or more"),
    ],
)
def test_one_edit_one_line(old, new, line):
    assert old in RECIPE
    assert faults(RECIPE.replace(old, new)) == [line]


def test_all_faults_at_once_in_the_order_of_the_schema():
    text = RECIPE.replace("mlm", "mln").replace("1e-3", "fast") + "amp: {precison: bf16}\nname: again\n"
    lines = faults(text, "memory.budget=24", "nothing")
    assert [line.split(": ")[1] for line in lines] == [
        "name",
        "nothing",
        "train.objective",
        "optimizer.learning_rate",
        "amp.precison",
        "memory.budget",
    ]


def test_a_key_at_fault_in_yaml_gets_no_second_line():
    (line,) = faults(f"{RECIPE}seed: &a 5\nmemory: {{budget: *a}}\n")
    assert line.startswith("r.yaml:8: seed: anchors (&a) are not understood; write the value itself")
    (line,) = faults(f"{RECIPE}seed: !!int 5\n")
    assert line.startswith("r.yaml:8: seed: tags (!!int) are not understood; write the value itself")


def test_long_values_and_odd_keys_stay_short():
    (line,) = faults(f"{RECIPE}seed: {'x' * 10_000}\n")
    assert len(line) < 200
    (line,) = faults(f'{RECIPE}"a\\nb\\u2028": 1\n')
    assert line.startswith(r"r.yaml:8: 'a\nb\u2028': unknown key; a recipe has name, seed, model, ")
