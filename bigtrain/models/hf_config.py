"""Hugging Face's config.json to and from a model's shape, refusing what the models here do not compute."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

from bigtrain import strict_json
from bigtrain.config.model import NORM_EPS, ModelConfig
from bigtrain.config.schema import Family
from bigtrain.errors import CheckpointError, Fault, InputError, did_you_mean
from bigtrain.models.shape import SEGMENTS

CONFIG, GENERATION_CONFIG = "config.json", "generation_config.json"
"""The files' names in a Hugging Face folder, and in one that was imported from it."""

FAMILIES: dict[str, Family] = {
    "BertForMaskedLM": "bert",
    "BertForPreTraining": "bert",
    "GPT2LMHeadModel": "gpt",
    "LlamaForCausalLM": "llama",
}
NEXT_SENTENCE = "BertForPreTraining"
"""The architecture that has a next-sentence head besides the one onto the vocabulary."""
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

SIZES = (
    "vocab_size",
    "hidden_size",
    "num_hidden_layers",
    "num_attention_heads",
    "intermediate_size",
    "max_position_embeddings",
)

LARGEST_SIZE = 2**31
KINDS: dict[str, tuple[tuple[type, ...], str]] = {
    "num_key_value_heads": ((int,), "a whole number of 1 or more"),
    "norm_eps": ((int, float), "a number"),
    "initializer_range": ((int, float), "a number"),
    "tie_word_embeddings": ((bool,), "true or false"),
}

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
    """Return config.json. The ids of special tokens are null: the tokenizer knows them."""
    family = config.family
    architecture = next(name for name, known in FAMILIES.items() if known == family)
    if config.next_sentence:
        architecture = NEXT_SENTENCE
    names = (*SIZES, "norm_eps", "initializer_range", "tie_word_embeddings")
    written = {_key(family, name): getattr(config, name) for name in names}
    special = dict.fromkeys(("bos_token_id", "eos_token_id", "pad_token_id"))
    rotary = {
        "num_key_value_heads": config.num_key_value_heads,
        "rope_theta": config.rope_theta,
        "rope_parameters": {"rope_type": "default", "rope_theta": config.rope_theta},
    }
    return {
        "architectures": [architecture],
        "model_type": MODEL_TYPES[family],
        **written,
        **(rotary if family == "llama" else {}),
        **FIXED[family],
        **special,
    }


def config_from_json(config_json: Mapping[str, Any]) -> ModelConfig:
    """Return the shape that a config.json describes; raises InputError with every fault found in it."""
    architecture = _architecture(config_json)
    family = FAMILIES[architecture]
    keys = {name: config_json[_key(family, name)] for name in _SHAPE if config_json.get(_key(family, name)) is not None}
    faults = [*_unsupported(family, config_json), *_bad_sizes(family, keys)]
    if faults:
        raise InputError(*faults)
    defaults = {
        "num_key_value_heads": keys["num_attention_heads"],
        "intermediate_size": 4 * keys["hidden_size"],
        "norm_eps": NORM_EPS[family],
        "tie_word_embeddings": family != "llama",
    }
    defaults["next_sentence"] = architecture == NEXT_SENTENCE
    config = ModelConfig(family=family, **{**defaults, **keys, **_rotary(family, config_json)})
    _refuse_heads(config, config_json)
    return config


def kept_config(folder: Path, name: str = CONFIG) -> dict[str, Any]:
    """Return the config.json, or the other, that an imported folder came with; {} where it has none, as runs have.

    Raises CheckpointError for one that holds no JSON object.
    """
    path = folder / name
    if not path.is_file():
        return {}
    try:
        found = strict_json.read(path)
    except (OSError, ValueError) as error:
        raise CheckpointError(f"{path}: damaged: {error}; import the folder again") from error
    if not isinstance(found, dict):
        raise CheckpointError(f"{path}: damaged: not a JSON object; import the folder again")
    return found


def token_ids(named: object, vocab_size: int) -> list[int]:
    """Return the ids that a config.json names for one role, a number or a list; none unless the vocabulary has all."""
    found: list[Any] = named if isinstance(named, list) else [named]
    return found if all(type(number) is int and 0 <= number < vocab_size for number in found) else []


_SHAPE = (*SIZES, "num_key_value_heads", "norm_eps", "initializer_range", "tie_word_embeddings")


def _key(family: Family, name: str) -> str:
    return KEYS[family].get(name, name)


def _fault(key: str, text: str) -> Fault:
    return Fault(CONFIG, key, text)


def _architecture(config_json: Mapping[str, Any]) -> str:
    names = config_json.get("architectures") or []
    if not isinstance(names, list):
        names = [names]
    for name in names:
        if isinstance(name, str) and name in FAMILIES:
            return name
    found = ", ".join(map(str, names)) or "none given"
    spelled_alike = [name for name in FAMILIES if found.lower() == name.lower()]  # DistilBert is no mistyped Bert
    hint = did_you_mean(found, spelled_alike)
    raise InputError(_fault("architectures", f"{found}; supported are {', '.join(FAMILIES)}{hint}"))


def _unsupported(family: Family, config_json: Mapping[str, Any]) -> Iterator[Fault]:
    if config_json.get("auto_map"):
        yield _fault("auto_map", "names code that comes with the model, which is never run; models of that are refused")
    for key, supported in FIXED[family].items():
        value = config_json.get(key)
        if value is not None and value != supported:
            yield _fault(key, f"{value!r} is not supported, only {supported!r}")
    for key in ("rope_scaling", "rope_parameters") if family == "llama" else ():
        rope = config_json.get(key) or {}
        if not isinstance(rope, dict):
            yield _fault(key, f"{rope!r} is not an object")
            continue
        kind = rope.get("rope_type", rope.get("type", "default"))
        if kind != "default":
            yield _fault(key, f"rope type {kind!r} is not supported, only 'default'")
        if rope.get("partial_rotary_factor", 1.0) != 1.0:
            yield _fault(f"{key}.partial_rotary_factor", f"{rope['partial_rotary_factor']} is not supported, only 1.0")


def _bad_sizes(family: Family, keys: Mapping[str, Any]) -> Iterator[Fault]:
    for name in SIZES:
        value = keys.get(name)
        if value is None and name == "intermediate_size" and family == "gpt":
            continue
        if type(value) is not int or not 1 <= value <= LARGEST_SIZE:
            found = "missing" if value is None else f"{value!r}"[:80]
            yield _fault(_key(family, name), f"{found}; a whole number of 1 or more should be there")
    for name, (kinds, what) in KINDS.items():
        if keys.get(name) is not None and (type(keys[name]) not in kinds or (kinds == (int,) and keys[name] < 1)):
            yield _fault(_key(family, name), f"{keys[name]!r}"[:80] + f"; {what} should be there")


def _rotary(family: Family, config_json: Mapping[str, Any]) -> dict[str, float]:
    """Read the base of the rotary frequencies, which transformers 5 moved into `rope_parameters`."""
    theta = (config_json.get("rope_parameters") or {}).get("rope_theta", config_json.get("rope_theta"))
    return {"rope_theta": theta} if family == "llama" and theta is not None else {}


def _refuse_heads(config: ModelConfig, config_json: Mapping[str, Any]) -> None:
    width, heads, shared = config.hidden_size, config.num_attention_heads, config.num_key_value_heads
    if width % heads:
        raise InputError(
            _fault(_key(config.family, "num_attention_heads"), f"{heads} does not divide the width {width}")
        )
    if heads % shared:
        raise InputError(_fault("num_key_value_heads", f"{shared} does not divide num_attention_heads {heads}"))
    head_dim = config_json.get("head_dim")
    if head_dim is not None and head_dim != config.head_dim:
        raise InputError(_fault("head_dim", f"{head_dim} is not supported, only {width} / {heads} = {config.head_dim}"))
