"""Small models of transformers, saved as it saves them."""

from __future__ import annotations

import logging
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest
import torch

VOCABULARY = 100
"""Not a multiple of 64, so that there is padding."""

SHAPE = {
    "vocab_size": VOCABULARY,
    "hidden_size": 32,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "intermediate_size": 48,
    "max_position_embeddings": 40,
}
GPT2 = {"vocab_size": VOCABULARY, "n_embd": 32, "n_layer": 2, "n_head": 4, "n_inner": 48, "n_positions": 40}
GPT2 |= {"bos_token_id": None, "eos_token_id": None}


def their_model(family: str, **changes: Any) -> Any:
    """Return transformers' model of a family, every weight of it random."""
    import transformers

    config, model, keys = {
        "bert": (transformers.BertConfig, transformers.BertForMaskedLM, SHAPE),
        "gpt": (transformers.GPT2Config, transformers.GPT2LMHeadModel, GPT2),
        "llama": (transformers.LlamaConfig, transformers.LlamaForCausalLM, SHAPE | {"num_key_value_heads": 2}),
    }[family]
    with torch.random.fork_rng():
        torch.manual_seed(7)
        made = model(config(**{**keys, **changes})).eval()
        with torch.no_grad():
            for parameter in made.parameters():
                parameter.normal_(std=0.1)
            if family == "bert":  # untied, transformers keeps two biases and reads the decoder's; we keep that one
                made.cls.predictions.bias.copy_(made.cls.predictions.decoder.bias)
    return made


@pytest.fixture
def saved(tmp_path: Path) -> Callable[..., tuple[Path, Any]]:
    """Return a maker of folders: `saved("gpt", dtype=..., **changes)` gives the folder and the model in it."""

    def save(family: str, *, dtype: torch.dtype | None = None, shard: str = "5GB", **changes: Any) -> tuple[Path, Any]:
        model = their_model(family, **changes)
        model = model if dtype is None else model.to(dtype)
        folder = tmp_path / f"{family}-theirs"
        model.save_pretrained(folder, max_shard_size=shard)
        return folder, model

    return save


@pytest.fixture
def warned() -> Iterator[list[str]]:
    """Return what transformers logs from here on as a warning or worse."""
    from transformers.utils import logging as theirs

    lines: list[str] = []
    handler = logging.Handler(logging.WARNING)
    handler.emit = lambda record: lines.append(record.getMessage())  # type: ignore[method-assign]
    logger = theirs.get_logger("transformers")
    logger.addHandler(handler)
    yield lines
    logger.removeHandler(handler)
