"""What transformers wants beside tokenizer.json, what came in beside it, and the special ids of config.json."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import Any

from tokenizers import Tokenizer

from bigtrain import strict_json
from bigtrain.checkpoint import manifest
from bigtrain.checkpoint.state import TOKENIZER
from bigtrain.config.model import ModelConfig
from bigtrain.data.vocabulary import LARGEST_TOKENIZER_BYTES, SpecialTokens
from bigtrain.errors import Fault, InputError
from bigtrain.models.hf_config import GENERATION_CONFIG, token_ids

TOKENIZER_CONFIG = "tokenizer_config.json"

KEPT = (
    TOKENIZER_CONFIG, "special_tokens_map.json", "added_tokens.json", GENERATION_CONFIG, "chat_template.jinja",
    "vocab.txt", "vocab.json", "merges.txt", "tokenizer.model",
)  # fmt: skip
"""Files of a Hugging Face folder that an import keeps as they came, for the export."""

TOKENIZER_AS_IT_CAME = "source-tokenizer.json"
"""Where an imported folder keeps the tokenizer.json of its source: its own is without truncation and padding."""

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

    They are those of the config.json that the model came with, a number or a list, as far as the vocabulary has them;
    what is absent there is found in the tokenizer.
    """
    ids: dict[str, Any] = {}
    for name in ID_ROLES["causal"]:
        key = f"{name}_token_id"
        found = getattr(marks, name) if marks is not None and name in ID_ROLES[_kind(config)] else None
        named = source[key] if token_ids(source.get(key), config.vocab_size) else found
        ids[key] = named if token_ids(named, config.vocab_size) else None
    return ids


def generation_config(ids: Mapping[str, Any]) -> dict[str, Any]:
    """Return generation_config.json of a causal model."""
    return {"_from_model_config": True, **{key: number for key, number in ids.items() if number is not None}}


def read_kept(source: Path) -> dict[str, bytes]:
    """Return what a Hugging Face folder has beside its weights, by the name that an imported folder gives it.

    Raises InputError for a file that is too large to be one of these, and a generation_config.json that is none.
    """
    _check_object(source / GENERATION_CONFIG)
    places = {**{name: name for name in KEPT}, TOKENIZER: TOKENIZER_AS_IT_CAME}
    return {kept: _bounded(source / name) for name, kept in places.items() if (source / name).is_file()}


def kept_files(checkpoint: Path) -> dict[str, bytes]:
    """Return what an imported folder keeps, by the names that it came with; {} of a run's checkpoint."""
    places = {**{name: name for name in KEPT}, TOKENIZER_AS_IT_CAME: TOKENIZER}
    held = manifest.read(checkpoint)["files"]
    return {name: _bounded(checkpoint / kept) for kept, name in places.items() if kept in held}


def _check_object(path: Path) -> None:
    """Raise InputError for a file that is there and holds no JSON object."""
    if not path.is_file():
        return
    remedy = "put the model's own there, or remove it"
    try:
        found = strict_json.read(path)
    except (OSError, ValueError) as error:
        raise InputError(Fault(str(path), "", f"{error}; {remedy}")) from error
    if not isinstance(found, dict):
        raise InputError(Fault(str(path), "", f"not a JSON object; {remedy}"))


def _bounded(path: Path) -> bytes:
    with path.open("rb") as file:
        content = file.read(LARGEST_TOKENIZER_BYTES + 1)
    if len(content) > LARGEST_TOKENIZER_BYTES:
        text = f"larger than {LARGEST_TOKENIZER_BYTES // 2**20} MiB; put the model's own there, or remove it"
        raise InputError(Fault(str(path), "", text))
    return content


def _kind(config: ModelConfig) -> str:
    return "causal" if config.causal else "bert"
