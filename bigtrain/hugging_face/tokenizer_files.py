"""What transformers wants beside tokenizer.json, and the ids of special tokens that go into config.json."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from tokenizers import Tokenizer

from bigtrain.config.model import ModelConfig
from bigtrain.data.vocabulary import SpecialTokens

TOKENIZER_CONFIG = "tokenizer_config.json"

ROLES = {
    "bert": {"cls_token": "bos", "sep_token": "eos", "mask_token": "mask", "pad_token": "pad", "unk_token": "unk"},
    "causal": {"bos_token": "bos", "eos_token": "eos", "pad_token": "pad", "unk_token": "unk"},
}
"""transformers' names of the special tokens that we find by their usual spelling."""

ID_ROLES = {"bert": ("pad",), "causal": ("bos", "eos", "pad")}
"""Those whose ids stand in config.json."""


def tokenizer_config(config: ModelConfig, tokenizer: Tokenizer, marks: SpecialTokens) -> dict[str, Any]:
    """Return tokenizer_config.json of a tokenizer.json; the generic class reads all that it needs from that file."""
    found = {role: getattr(marks, name) for role, name in ROLES[_kind(config)].items()}
    # A causal model must not be given segments: GPT-2 would add the embedding of token 0 for them.
    inputs = ["input_ids", "attention_mask"] if config.causal else ["input_ids", "token_type_ids", "attention_mask"]
    return {
        "tokenizer_class": "PreTrainedTokenizerFast",
        "model_max_length": config.max_position_embeddings,
        "model_input_names": inputs,
        "clean_up_tokenization_spaces": False,
        **{role: tokenizer.id_to_token(number) for role, number in found.items() if number is not None},
    }


def special_ids(config: ModelConfig, marks: SpecialTokens | None, source: Mapping[str, Any]) -> dict[str, Any]:
    """Return the ids of special tokens for config.json, null where there is none.

    They are the tokenizer's; without one, those of the config.json that the model came with, as far as the vocabulary
    has them.
    """
    ids: dict[str, Any] = {f"{name}_token_id": None for name in ID_ROLES["causal"]}
    for name in ID_ROLES[_kind(config)]:
        key = f"{name}_token_id"
        ids[key] = source.get(key) if marks is None else getattr(marks, name)
    return {key: number if _is_token(number, config) else None for key, number in ids.items()}


def generation_config(ids: Mapping[str, Any]) -> dict[str, Any]:
    """Return generation_config.json of a causal model."""
    return {"_from_model_config": True, **{key: number for key, number in ids.items() if number is not None}}


def _is_token(number: object, config: ModelConfig) -> bool:
    return type(number) is int and 0 <= number < config.vocab_size


def _kind(config: ModelConfig) -> str:
    return "causal" if config.causal else "bert"
