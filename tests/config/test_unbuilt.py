"""What this version does not do is refused, never ignored."""

from __future__ import annotations

import pytest

from bigtrain.config.keys import choices, schema_keys
from bigtrain.config.load import load_recipe
from bigtrain.config.unbuilt import BUILT
from bigtrain.errors import RecipeError


def refused(*overrides):
    with pytest.raises(RecipeError) as error:
        load_recipe("quickstart_bert", overrides)
    return [str(fault) for fault in error.value.faults]


@pytest.mark.parametrize("key", BUILT)
def test_rows_name_keys_and_values_that_exist_and_admit_the_default(key):
    field = schema_keys()[key]
    default = field.default if isinstance(field.default, list) else [field.default]
    assert field.is_required() or all(item in BUILT[key] for item in default)
    if named := choices(key):
        assert {item for item in BUILT[key] if isinstance(item, str)} <= set(named)


@pytest.mark.parametrize(
    "override",
    [
        "train.objective=mlm_nsp",
        "logging.sample_every=5",
    ],
)
def test_refused(override):
    (line,) = refused(override)
    assert line.startswith(f"command line: {override.partition('=')[0]}: ")
    assert "is not in this version; use " in line


@pytest.mark.parametrize(
    "override",
    [
        "optimizer.name=muon",
        "optimizer.name=adafactor",
        "optimizer.state=8bit",
        "optimizer.state=auto",
        "optimizer.gradient_release=true",
        "optimizer.gradient_release=auto",
        "amp.precision=fp16",
        "amp.precision=fp8",
        "amp.master_weights=split24",
        "amp.master_weights=none",
        "amp.master_weights=auto",
        "recompute.policy=none",
        "recompute.policy=selective",
        "recompute.policy=offload",
        "recompute.policy=[full, none]",
        "recompute.policy=[none, none]",
        "amp.reduce=bf16",
        "sharding.zero_stage=3",
        "sharding.offload=all",
        "sharding.replicate=2",
        "sharding.engine=deepspeed",
        "sharding.tensor_parallel=2",
        "cluster.devices_per_node=2",
        "logging.trackers=[]",
        "logging.trackers=[tensorboard, wandb, comet]",
        "cluster.timeout=30s",
    ],
)
def test_accepted(override):
    load_recipe("quickstart_bert", [override])


def test_the_line_says_what_to_use():
    assert refused("train.objective=mlm_nsp") == [
        "command line: train.objective: 'mlm_nsp' is not in this version; use 'mlm' or 'clm'"
    ]
    assert refused("logging.sample_every=5") == [
        "command line: logging.sample_every: 5 is not in this version; use null"
    ]


def test_all_at_once_but_after_other_faults():
    assert len(refused("train.objective=mlm_nsp", "logging.sample_every=5")) == 2
    (line,) = refused("train.objective=mlm_nsp", "model.num_attention_heads=5")
    assert "num_attention_heads" in line
