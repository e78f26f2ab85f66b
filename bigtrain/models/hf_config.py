"""Hugging Face's config.json to and from a model's shape, refusing what the models here do not compute."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from bigtrain.config.model import NORM_EPS, ModelConfig
from bigtrain.config.schema import Family
from bigtrain.errors import Fault, InputError, did_you_mean
from bigtrain.models.shape import SEGMENTS

FAMILIES: dict[str, Family] = {"BertForMaskedLM": "bert", "GPT2LMHeadModel": "gpt", "LlamaForCausalLM": "llama"}
MODEL_TYPES: dict[Family, str] = {"bert": "bert", "gpt": "gpt2", "llama": "llama"}

GPT2_KEYS = {
    "hidden_size": "n_embd",
    "num_hidden_layers": "n_layer",
    "num_attention_heads": "n_head",
    "intermediate_size": "n_inner",
    "max_position_embeddings": "n_positions",
    "norm_eps": "layer_norm_epsilon",
}
KEYS: dict[Family, dict[str, str]] = {
    "bert": {"norm_eps": "layer_norm_eps"},
    "gpt": GPT2_KEYS,
    "llama": {"norm_eps": "rms_norm_eps"},
}
"""Keys that are spelled otherwise than ours."""

REQUIRED = ("vocab_size", "hidden_size", "num_hidden_layers", "num_attention_heads", "max_position_embeddings")

FIXED: dict[Family, dict[str, Any]] = {
    "bert": {
        "hidden_act": "gelu",
        "position_embedding_type": "absolute",
        "type_vocab_size": SEGMENTS,
        "is_decoder": False,
        "add_cross_attention": False,
    },
    "gpt": {
        "activation_function": "gelu_new",
        "scale_attn_weights": True,
        "scale_attn_by_inverse_layer_idx": False,
        "reorder_and_upcast_attn": False,
        "add_cross_attention": False,
    },
    "llama": {"hidden_act": "silu", "attention_bias": False, "mlp_bias": False},
}
"""Features that the models here have in one form only; an absent key means that form, as in transformers."""


def config_to_json(config: ModelConfig) -> dict[str, Any]:
    """Return config.json. Special tokens are null: their ids are the tokenizer's to say."""
    family = config.family
    architecture = next(name for name, known in FAMILIES.items() if known == family)
    names = (*REQUIRED, "intermediate_size", "norm_eps", "initializer_range", "tie_word_embeddings")
    written = {KEYS[family].get(name, name): getattr(config, name) for name in names}
    special = dict.fromkeys(("bos_token_id", "eos_token_id", "pad_token_id"))
    found = {"architectures": [architecture], "model_type": MODEL_TYPES[family], **written, **FIXED[family], **special}
    if family == "llama":
        found["num_key_value_heads"] = config.num_key_value_heads
        found["rope_theta"] = config.rope_theta
        found["rope_parameters"] = {"rope_type": "default", "rope_theta": config.rope_theta}
    return found


def config_from_json(config_json: Mapping[str, Any]) -> ModelConfig:
    """Return the shape that a config.json describes; raises InputError with every fault in it."""
    family = _family(config_json)
    faults = list(_unsupported(family, config_json))
    values = {name: config_json.get(KEYS[family].get(name, name)) for name in REQUIRED}
    faults += [_fault(KEYS[family].get(name, name), _not_count(value)) for name, value in values.items() if _not_count(value)]
    if faults:
        raise InputError(*faults)
    width, heads = values["hidden_size"], values["num_attention_heads"]
    get = _reader(family, config_json)
    if width % heads or get("head_dim", width // heads) != width // heads:
        raise InputError(_fault("head_dim", f"{width} / {heads} heads is not {get('head_dim', 'whole')}; not supported"))
    return ModelConfig(
        family=family,
        **values,
        num_key_value_heads=get("num_key_value_heads", heads) if family == "llama" else heads,
        intermediate_size=get("intermediate_size", 4 * width),
        initializer_range=get("initializer_range", 0.02),
        norm_eps=get("norm_eps", NORM_EPS[family]),
        rope_theta=_rope(config_json).get("rope_theta", 10000.0) if family == "llama" else 10000.0,
        tie_word_embeddings=get("tie_word_embeddings", family != "llama"),
    )
