"""The shape of a model with nothing left open: what the model code, the cost functions and the exporter read."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

from bigtrain.config.presets import PRESETS
from bigtrain.config.schema import Family, ModelSection

VOCABULARY_MULTIPLE = 64
"""Matrix products are fast at multiples of this; rows beyond `vocab_size` exist inside the model only."""

NORM_EPS: dict[Family, float] = {"bert": 1e-12, "gpt": 1e-5, "llama": 1e-6}


@dataclass(frozen=True)
class ModelConfig:
    """A model's shape. Fields are named as in Hugging Face's configurations."""

    family: Family
    vocab_size: int
    hidden_size: int
    num_hidden_layers: int
    num_attention_heads: int
    num_key_value_heads: int
    intermediate_size: int
    max_position_embeddings: int
    initializer_range: float = 0.02
    norm_eps: float = 1e-5
    rope_theta: float = 10000.0
    tie_word_embeddings: bool = True
    next_sentence: bool = False
    """Whether a pooler and a head tell of a pair of texts if the second follows the first (bert)."""

    @property
    def head_dim(self) -> int:
        return self.hidden_size // self.num_attention_heads

    @property
    def padded_vocab_size(self) -> int:
        return -(-self.vocab_size // VOCABULARY_MULTIPLE) * VOCABULARY_MULTIPLE

    @property
    def causal(self) -> bool:
        return self.family != "bert"


def resolve_model(
    section: ModelSection, *, vocab_size: int, sequence_length: int, next_sentence: bool = False
) -> ModelConfig:
    """Return the shape that a model section stands for: preset first, keys over it, then the family's defaults.

    `vocab_size` (the tokenizer's) and `sequence_length` are what `auto` means; `next_sentence` is what the objective
    needs. The section must have passed the recipe's checks: without a preset, hidden_size, num_hidden_layers and
    num_attention_heads are there.
    """
    preset = PRESETS.get(section.preset or "", {})
    written = {key: value for key, value in section if value not in (None, "auto") and key != "preset"}
    keys: dict[str, Any] = {
        "vocab_size": vocab_size,
        "norm_eps": NORM_EPS[section.family],
        "tie_word_embeddings": section.family != "llama",
        **preset,
        **written,
    }
    if section.max_position_embeddings == "auto":
        keys["max_position_embeddings"] = max(preset.get("max_position_embeddings", 0), sequence_length)
    keys.setdefault("intermediate_size", 4 * keys["hidden_size"])
    keys.setdefault("num_key_value_heads", keys["num_attention_heads"])
    return ModelConfig(**keys, next_sentence=next_sentence)
