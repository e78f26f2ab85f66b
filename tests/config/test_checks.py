"""What must fit together in a run."""

# ruff: noqa: E501  - lines that users read are tested whole

from __future__ import annotations

import math
import re

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from bigtrain.config.checks import batch_faults, node_counts, recipe_faults, world_sizes
from bigtrain.config.load import read_recipe

RECIPE = b"""\
model: {family: bert, preset: bert-tiny}
train:
  objective: mlm
  global_batch_size: 32
  steps: 100
optimizer: {learning_rate: 0}
"""


def read(*overrides, text=RECIPE):
    return read_recipe(text, "r.yaml", overrides)


def found(*overrides, text=RECIPE):
    return [str(fault) for fault in recipe_faults(read(*overrides, text=text))]


def test_a_fitting_recipe_has_no_faults():
    assert found() == []


@pytest.mark.parametrize(
    ("overrides", "line"),
    [
        (
            "train.objective=clm",
            "command line: train.objective: 'clm' does not fit the family 'bert'; use 'mlm' or 'mlm_nsp'",
        ),
        (
            "model.family=gpt model.preset=gpt2-124m",
            "command line: train.objective: 'mlm' does not fit the family 'gpt'; use 'clm'",
        ),
        (
            "model.family=gpt model.preset=gpt2-124m train.objective=mlm_nsp",
            "command line: train.objective: 'mlm_nsp' does not fit the family 'gpt'; use 'clm'",
        ),
        (
            "train.objective=mlm_nsp data.sequence_length=4",
            "command line: data.sequence_length: rows of 4 tokens have no room for [CLS] A [SEP] B [SEP]; use at least 5",
        ),
        (
            "model.family=gpt model.preset=gpt2-124m train.objective=clm train.whole_word_masking=true",
            "command line: train.whole_word_masking: 'clm' masks nothing; use false, or the objective 'mlm' or 'mlm_nsp' of the family 'bert'",
        ),
        (
            'data.mixture=[{"source":"embedded","weight":1}] data.source=README.md',
            "command line: data.source: a mixture names its sources itself; leave this out, or data.mixture",
        ),
        (
            'data.mixture=[{"source":"none.txt","weight":1}]',
            "command line: data.mixture: no such file or folder: 'none.txt'; name a folder, a file, a hub id or 'embedded'",
        ),
        (
            "data.min_characters=9 data.max_characters=8",
            "command line: data.min_characters: 9 is above data.max_characters, 8; no document is both",
        ),
        (
            "data.max_characters=2000000",
            "command line: data.max_characters: documents are cut at 1,048,576 characters before; use at most so many",
        ),
        (
            "train.steps=null",
            "command line: train.steps: missing; the length of the run is one of steps, tokens or epochs",
        ),
        (
            "train.steps=5 train.tokens=1M",
            "command line: train.tokens: the length of the run is given 2 times, as steps and tokens; keep one",
        ),
        (
            "optimizer.warmup_steps=101",
            "command line: optimizer.warmup_steps: 101 steps of warm-up are longer than the run of 100; write a share such as 6%",
        ),
        (
            "train.tokens=160K optimizer.warmup_steps=11",
            "command line: optimizer.warmup_steps: 11 steps of warm-up are longer than the run of 10; "
            "write a share such as 6%",
        ),
        (
            "optimizer.schedule=wsd optimizer.warmup_steps=81",
            "command line: optimizer.warmup_steps: 81 steps of warm-up reach into wsd's decay, the last fifth of the run of 100; use at most 80",
        ),
        (
            "optimizer.schedule=wsd optimizer.warmup_steps=81% train.epochs=2",
            "command line: optimizer.warmup_steps: 81% of warm-up reach into wsd's decay, the last fifth of the run; use at most 80%",
        ),
        (
            "model.num_hidden_layers=1001",
            "command line: model.num_hidden_layers: 1001 is too large to plan; at most 1,000",
        ),
        (
            "train.global_batch_size=8589934592",
            "command line: train.global_batch_size: 8589934592 is too large to plan; at most 4,294,967,296",
        ),
        ("cluster.nodes=1:70000", "command line: cluster.nodes: 70000 is too large to plan; at most 65,536"),
        (
            "train.micro_batch_size=5",
            "command line: train.global_batch_size: 32 is not divisible by micro_batch_size 5; nearest that are: 30, 35; "
            "or micro_batch_size 4, 8",
        ),
        (
            "train.micro_batch_size=64",
            "command line: train.global_batch_size: 32 is not divisible by micro_batch_size 64; nearest that are: 64; "
            "or micro_batch_size 32",
        ),
        (
            "cluster.devices_per_node=3",
            "command line: train.global_batch_size: 32 is not divisible by 3 ranks; nearest that are: 30, 33; or 1, 2, 4, 8, 16 or 32 ranks",
        ),
        (
            "cluster.devices_per_node=2 train.global_batch_size=7 train.micro_batch_size=1",
            "command line: train.global_batch_size: 7 is not divisible by micro_batch_size 1 x 2 ranks; nearest that are: 6, 8; or 1 or 7 ranks",
        ),
        (
            "cluster.devices_per_node=2 cluster.nodes=2:3",
            "command line: train.global_batch_size: 32 is not divisible by 4 and 6 ranks; nearest that are: 24, 36",
        ),
        ("cluster.nodes=4:2", "command line: cluster.nodes: '4:2' has the least above the most; write '2:4'"),
        (
            "cluster.devices_per_node=1 cluster.nodes=2:4",
            "command line: train.global_batch_size: 32 is not divisible by 2, 3 and 4 ranks; nearest that are: 24, 36",
        ),
        (
            "cluster.devices_per_node=1 cluster.nodes=8:999",
            "command line: train.global_batch_size: 32 is not divisible by 8, 9, ... and 999 ranks; no number is; name fewer nodes",
        ),
        (
            "cluster.rendezvous=node1",
            "command line: cluster.rendezvous: 'node1' is not host:port; write the name of a node and a free port, such as node1:29400",
        ),
        (
            "data.source=no/such/folder",
            "command line: data.source: no such file or folder: 'no/such/folder'; name a folder, a file, a hub id or 'embedded'",
        ),
        (
            "data.source=[b,a.txt]",
            "command line: data.source: no such file or folder: 'a.txt'; name a folder, a file, a hub id or 'embedded'",
        ),
        (
            "data.source=[embedded,a.txt]",
            "command line: data.source: 'embedded' stands alone, not in a list; write data.source: embedded",
        ),
        (
            "data.tokenizer=./tok",
            "command line: data.tokenizer: no such file or folder: './tok'; name a tokenizer.json or write 'train'",
        ),
    ],
)
def test_faults(overrides, line, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    assert found(*overrides.split()) == [line]


@pytest.mark.parametrize(
    "overrides",
    [
        "train.micro_batch_size=8",
        "cluster.devices_per_node=4 cluster.nodes=1:2",
        "cluster.nodes=2 cluster.rendezvous=node1:29400",
        'cluster.rendezvous="[fd00::1]:29400"',
        "optimizer.warmup_steps=100",
        "optimizer.warmup_steps=100%",
        "optimizer.warmup_steps=80% optimizer.schedule=wsd",
        "optimizer.warmup_steps=80 optimizer.schedule=wsd",
        "train.epochs=0.5 optimizer.warmup_steps=1M",
        "data.source=owner/name",
        "data.source=name",
        "train.objective=mlm_nsp",
        "optimizer.warmup_steps=5 optimizer.schedule=constant",
        "train.label_smoothing=0.1 train.z_loss=1e-4",
        "cluster.devices_per_node=auto",
    ],
)
def test_no_faults(overrides):
    assert found(*overrides.split()) == []


def test_paths_that_exist(tmp_path):
    (tmp_path / "a.txt").touch()
    assert found(f"data.source={tmp_path}", f"data.tokenizer={tmp_path}/a.txt") == []
    assert found(f"data.source={tmp_path}/b.txt") != []


def test_a_path_too_long_is_a_fault():
    (line,) = found(f"data.source=./{'x' * 5000}")
    assert line.startswith("command line: data.source: ") and len(line) < 6000


def test_all_faults_at_once():
    overrides = (
        "train.objective=clm train.steps=null train.micro_batch_size=5 data.source=./no model.num_attention_heads=3"
    )
    assert len(found(*overrides.split())) == 5


def test_lengths_in_the_file_name_the_line_of_the_second():
    text = RECIPE.replace(b"  steps: 100", b"  steps: 100\n  epochs: 2")
    assert found(text=text) == [
        "r.yaml:6: train.epochs: the length of the run is given 2 times, as steps and epochs; keep one"
    ]


@pytest.mark.parametrize(
    ("overrides", "sizes"),
    [
        ("", []),
        ("train.device=cpu", [1]),
        ("cluster.devices_per_node=8", [8]),
        ("train.device=cuda", []),
        ("cluster.nodes=3 cluster.devices_per_node=2", [6]),
        ("cluster.nodes=2:4 cluster.devices_per_node=8", [16, 24, 32]),
        ("cluster.nodes=2:4 train.device=cpu", [2, 3, 4]),
        ("cluster.nodes=4:2 train.device=cpu", []),
    ],
)
def test_world_sizes(overrides, sizes):
    assert world_sizes(read(*overrides.split())) == sizes


@settings(max_examples=200, deadline=None)
@given(st.integers(1, 500), st.integers(1, 12), st.lists(st.integers(1, 12), max_size=2))
def test_the_nearest_batch_sizes_divide(total, micro, ranks):
    recipe = read(f"train.global_batch_size={total}", f"train.micro_batch_size={micro}")
    faults = batch_faults(recipe, ranks)
    share = micro * math.lcm(*ranks)
    assert bool(faults) == (total % share != 0)
    for fault in faults:
        text, counts = re.fullmatch(r"(.*?)(?:; or ([0-9, or]+) ranks)?", fault.text).groups()
        sizes, _, micro_sizes = text.partition("nearest that are: ")[2].partition("; or micro_batch_size ")
        assert bool(counts) == (len(ranks) == 1 and total % micro == 0)
        assert all(total % (micro * int(count)) == 0 for count in re.findall("[0-9]+", counts or ""))
        near = [int(size) for size in sizes.split(", ")]
        assert all(size % share == 0 and abs(size - total) < share for size in near)
        assert all(total % (int(size) * math.lcm(*ranks)) == 0 for size in micro_sizes.split(", ") if size)


@given(st.integers(1, 50), st.integers(0, 9))
def test_every_number_of_nodes_between_the_ends_counts(least, more):
    assert node_counts(f"{least}:{least + more}") == list(range(least, least + more + 1))
    assert node_counts(least) == [least]
