"""Published shapes are well formed."""

from __future__ import annotations

import pytest

from bigtrain.config.model import resolve_model
from bigtrain.config.presets import PRESETS
from bigtrain.config.schema import ModelSection


@pytest.mark.parametrize("name", PRESETS)
def test_preset_is_a_whole_shape(name):
    section = ModelSection(family=PRESETS[name]["family"], preset=name)
    model = resolve_model(section, vocab_size=1000, sequence_length=128)
    assert model.hidden_size % model.num_attention_heads == 0
    assert model.num_attention_heads % model.num_key_value_heads == 0
    assert model.head_dim in (64, 128)
    assert name.startswith({"bert": "bert-", "gpt": "gpt2-", "llama": "llama-"}[model.family])


def test_published_numbers():
    large = PRESETS["bert-large"]
    assert (large["hidden_size"], large["num_hidden_layers"], large["num_attention_heads"]) == (1024, 24, 16)
    assert PRESETS["gpt2-xl"]["num_attention_heads"] == 25
    assert PRESETS["llama-70b"]["num_key_value_heads"] == 8
