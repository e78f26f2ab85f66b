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


@pytest.fixture
def unbuilt(monkeypatch):
    """Have two keys of which not all is built."""
    monkeypatch.setitem(BUILT, "logging.sample_every", (None,))
    monkeypatch.setitem(BUILT, "optimizer.name", ("adamw", "lamb"))


def test_rows_name_keys_and_values_that_exist_and_admit_the_default():
    for key, built in BUILT.items():
        field = schema_keys()[key]
        default = field.default if isinstance(field.default, list) else [field.default]
        assert field.is_required() or all(item in built for item in default)
        if named := choices(key):
            assert {item for item in built if isinstance(item, str)} <= set(named)


@pytest.mark.parametrize(
    "override",
    [
        "train.objective=mlm_nsp",
        "logging.sample_every=5",
        "train.whole_word_masking=true",
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


def test_the_line_says_what_to_use(unbuilt):
    assert refused("logging.sample_every=5") == [
        "command line: logging.sample_every: 5 is not in this version; use null"
    ]
    assert refused("optimizer.name=muon") == [
        "command line: optimizer.name: 'muon' is not in this version; use 'adamw' or 'lamb'"
    ]


def test_all_at_once_but_after_other_faults(unbuilt):
    assert len(refused("logging.sample_every=5", "optimizer.name=muon")) == 2
    (line,) = refused("logging.sample_every=5", "model.num_attention_heads=5")
    assert "num_attention_heads" in line
