"""The small shape that tests of several folders build models of."""

from __future__ import annotations

from typing import Any

from bigtrain.config.model import NORM_EPS, ModelConfig


def small_shape(family: Any, **changes: Any) -> ModelConfig:
    """Return a shape of a family, of two blocks; its vocabulary is no multiple of 64, so that there is padding."""
    keys: dict[str, Any] = {
        "vocab_size": 100,
        "hidden_size": 32,
        "num_hidden_layers": 2,
        "num_attention_heads": 4,
        "num_key_value_heads": 2 if family == "llama" else 4,
        "intermediate_size": 48,
        "max_position_embeddings": 40,
        "norm_eps": NORM_EPS[family],
        "tie_word_embeddings": family != "llama",
    }
    return ModelConfig(family=family, **{**keys, **changes})
