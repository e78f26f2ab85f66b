"""Which tokens continue a word that an earlier token begins: what whole-word masking goes by."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from bigtrain.data.decoding import data_error
from bigtrain.data.vocabulary import read_tokenizer_json

WORDPIECE_PREFIX = "##"
BYTE_SPACES = "ĠĊĉč"
"""How byte-level BPE writes space, line feed, tab and carriage return (GPT-2's table of bytes)."""
META_SPACE = "▁"


def continuing_tokens(tokenizer_file: Path, vocab_size: int, origin: str = "") -> NDArray[np.bool_]:
    """Return for each token id if it continues a word: (vocab_size,).

    WordPiece marks the tokens that do. Byte-level BPE and SentencePiece mark those that begin one, with the space
    before it; a token that begins with another character than a letter or a digit begins one there too. Raises
    DataError for another kind of tokenizer.
    """
    contents = read_tokenizer_json(tokenizer_file)
    model, continues = contents["model"], np.zeros(vocab_size, np.bool_)
    kinds = set(_types([contents.get("pre_tokenizer"), contents.get("decoder")]))
    vocabulary = _ids(model)
    if model.get("type") == "WordPiece":
        prefix = model.get("continuing_subword_prefix") or WORDPIECE_PREFIX
        found = [number for token, number in vocabulary.items() if token.startswith(prefix) and token != prefix]
    elif kinds & {"ByteLevel", "Metaspace"}:
        found = [number for token, number in vocabulary.items() if _continues(token)]
    else:
        text = (
            "this tokenizer does not tell which tokens continue a word; use false, or a WordPiece, byte-level BPE or "
            "SentencePiece tokenizer"
        )
        raise data_error(origin, text, "train.whole_word_masking")
    continues[[number for number in found if number < vocab_size]] = True
    special = [token.get("id") for token in contents.get("added_tokens") or [] if isinstance(token, dict)]
    continues[[number for number in special if isinstance(number, int) and number < vocab_size]] = False
    return continues


def _continues(token: str) -> bool:
    return bool(token) and token[0] not in BYTE_SPACES + META_SPACE and (token[0].isalnum() or ord(token[0]) > 127)


def _ids(model: Mapping[str, Any]) -> dict[str, int]:
    """Return a model's tokens; Unigram has a list of (token, score)."""
    vocabulary = model.get("vocab") or {}
    if isinstance(vocabulary, dict):
        return vocabulary
    return {entry[0]: number for number, entry in enumerate(vocabulary)}


def _types(part: object) -> Iterator[str]:
    """Yield the types of a part of a tokenizer and of what it is made of."""
    if isinstance(part, dict):
        if isinstance(part.get("type"), str):
            yield part["type"]
        for value in part.values():
            yield from _types(value)
    elif isinstance(part, list):
        for value in part:
            yield from _types(value)
