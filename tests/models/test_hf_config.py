"""config.json: read back as written, read by transformers, refused where the models here would compute otherwise."""

from __future__ import annotations

import json
from typing import Any

import pytest

from bigtrain.config.model import NORM_EPS
from bigtrain.errors import InputError
from bigtrain.models.hf_config import config_from_json, config_to_json

FAMILIES = ("bert", "gpt", "llama")


@pytest.mark.parametrize("family", FAMILIES)
def test_what_is_written_is_read_back(tiny, family):
    config = tiny(family, intermediate_size=77, norm_eps=0.25, initializer_range=0.5)
    assert config_from_json(json.loads(json.dumps(config_to_json(config)))) == config


def test_the_rotary_base_is_written_for_old_and_new_readers(tiny):
    written = config_to_json(tiny("llama", rope_theta=777.0))
    assert written["rope_theta"] == written["rope_parameters"]["rope_theta"] == 777.0
    for rope in ({"rope_theta": 777.0}, {"rope_parameters": {"rope_theta": 777.0}}):
        older = {key: value for key, value in written.items() if not key.startswith("rope")}
        assert config_from_json({**older, **rope}).rope_theta == 777.0
    assert "rope_theta" not in config_to_json(tiny("gpt"))


@pytest.mark.parametrize("family", FAMILIES)
def test_transformers_reads_the_same_shape(tiny, family):
    import transformers

    config = tiny(family, intermediate_size=77)
    kind = {"bert": "BertConfig", "gpt": "GPT2Config", "llama": "LlamaConfig"}[family]
    theirs = getattr(transformers, kind).from_dict(config_to_json(config))
    for name in ("vocab_size", "hidden_size", "num_hidden_layers", "num_attention_heads", "max_position_embeddings"):
        assert getattr(theirs, name) == getattr(config, name), name
    assert theirs.tie_word_embeddings == config.tie_word_embeddings
    if family == "llama":
        assert theirs.num_key_value_heads == config.num_key_value_heads
        assert theirs.rope_parameters["rope_theta"] == config.rope_theta
    assert config_from_json(theirs.to_dict() | {"architectures": config_to_json(config)["architectures"]}) == config


def test_gpt2s_own_keys_are_written(tiny):
    written = config_to_json(tiny("gpt"))
    assert (written["n_embd"], written["n_layer"], written["n_head"], written["n_positions"]) == (32, 2, 4, 40)
    assert "hidden_size" not in written


@pytest.mark.parametrize("family", FAMILIES)
def test_absent_keys_mean_the_published_defaults(tiny, family):
    written = config_to_json(tiny(family))
    optional = ("eps", "epsilon", "tie_word", "rope", "act", "type_vocab", "initializer", "key_value")
    least = {key: value for key, value in written.items() if not any(part in key for part in optional)}
    read = config_from_json(least)
    assert read.norm_eps == NORM_EPS[family]
    assert read.tie_word_embeddings == (family != "llama")
    assert (read.initializer_range, read.rope_theta, read.num_key_value_heads) == (0.02, 10000.0, 4)


def test_gpt2_without_an_inner_width_has_four_times_the_width(tiny):
    assert config_from_json(config_to_json(tiny("gpt")) | {"n_inner": None}).intermediate_size == 128


@pytest.mark.parametrize(
    ("family", "key", "value"),
    [
        ("bert", "hidden_act", "relu"),
        ("bert", "position_embedding_type", "relative_key"),
        ("bert", "type_vocab_size", 1),
        ("bert", "is_decoder", True),
        ("gpt", "activation_function", "gelu"),
        ("gpt", "scale_attn_by_inverse_layer_idx", True),
        ("gpt", "scale_attn_weights", False),
        ("gpt", "add_cross_attention", True),
        ("llama", "hidden_act", "gelu"),
        ("llama", "attention_bias", True),
        ("llama", "mlp_bias", True),
    ],
)
def test_features_that_are_not_here_are_refused_by_name(tiny, family, key, value):
    with pytest.raises(InputError) as caught:
        config_from_json(config_to_json(tiny(family)) | {key: value})
    (fault,) = caught.value.faults
    assert (fault.where, fault.key) == ("config.json", key)
    assert fault.text.startswith(f"{value!r} is not supported, only ")


@pytest.mark.parametrize(
    "rope",
    [
        {"rope_scaling": {"type": "linear", "factor": 2.0}},
        {"rope_scaling": {"rope_type": "llama3", "factor": 8.0}},
        {"rope_parameters": {"rope_type": "yarn", "rope_theta": 1e4}},
    ],
)
def test_scaled_rotary_positions_are_refused(tiny, rope):
    (key,) = rope
    with pytest.raises(InputError, match=rf"config\.json: {key}: rope type '\w+' is not supported, only 'default'"):
        config_from_json(config_to_json(tiny("llama")) | rope)


def test_partial_rotary_positions_are_refused(tiny):
    rope = {"rope_parameters": {"rope_type": "default", "rope_theta": 1e4, "partial_rotary_factor": 0.5}}
    with pytest.raises(InputError, match=r"partial_rotary_factor: 0\.5 is not supported"):
        config_from_json(config_to_json(tiny("llama")) | rope)
    assert config_from_json(config_to_json(tiny("llama")) | {"rope_scaling": None}) == tiny("llama")


def test_every_fault_is_named_at_once(tiny):
    broken = config_to_json(tiny("gpt")) | {"activation_function": "relu", "n_embd": "32", "n_layer": 0}
    del broken["vocab_size"]
    with pytest.raises(InputError) as caught:
        config_from_json(broken)
    assert [fault.key for fault in caught.value.faults] == ["activation_function", "vocab_size", "n_embd", "n_layer"]
    assert "vocab_size: missing; a whole number" in str(caught.value)


@pytest.mark.parametrize("value", (3, 5))
def test_heads_that_do_not_divide_are_refused(tiny, value):
    with pytest.raises(InputError, match=f"n_head: {value} does not divide the width 32"):
        config_from_json(config_to_json(tiny("gpt")) | {"n_head": value})
    with pytest.raises(InputError, match=f"num_key_value_heads: {value} does not divide num_attention_heads 4"):
        config_from_json(config_to_json(tiny("llama")) | {"num_key_value_heads": value})


def test_a_head_dim_of_its_own_is_refused(tiny):
    assert config_from_json(config_to_json(tiny("llama")) | {"head_dim": 8}) == tiny("llama")
    with pytest.raises(InputError, match=r"head_dim: 16 is not supported, only 32 / 4 = 8"):
        config_from_json(config_to_json(tiny("llama")) | {"head_dim": 16})


@pytest.mark.parametrize(
    ("config_json", "text"),
    [
        ({}, "none given; supported are BertForMaskedLM, BertForPreTraining, GPT2LMHeadModel, LlamaForCausalLM"),
        ({"architectures": ["BertForNextSentencePrediction"]}, "BertForNextSentencePrediction; supported are"),
        ({"architectures": ["LLamaForCausalLM"]}, "did you mean 'LlamaForCausalLM'?"),
        ({"architectures": ["DistilBertForMaskedLM"]}, "DistilBertForMaskedLM; supported are"),
    ],
)
def test_architectures_that_are_not_supported(config_json, text):
    with pytest.raises(InputError) as caught:
        config_from_json(config_json)
    assert text in str(caught.value)
    assert ("did you mean" in str(caught.value)) == ("did you mean" in text)


@pytest.mark.parametrize(
    ("changes", "key"),
    [
        ({"auto_map": {"AutoModel": "modeling.Model"}}, "auto_map"),
        ({"architectures": {"a": 1}}, "architectures"),
        ({"hidden_size": 2**62}, "hidden_size"),
        ({"hidden_size": True}, "hidden_size"),
        ({"layer_norm_eps": [1]}, "layer_norm_eps"),
        ({"tie_word_embeddings": "yes"}, "tie_word_embeddings"),
    ],
)
def test_what_is_absurd_or_brings_code_is_refused(changes: dict[str, Any], key: str) -> None:
    sound = dict.fromkeys(("vocab_size", "hidden_size", "num_hidden_layers", "num_attention_heads"), 4)
    sound |= dict.fromkeys(("intermediate_size", "max_position_embeddings"), 4)
    with pytest.raises(InputError, match=f"^config.json: {key}: "):
        config_from_json({"architectures": ["BertForMaskedLM"], **sound, **changes})
