"""Which tokens continue a word that an earlier token begins: what whole-word masking goes by."""

from __future__ import annotations

import unicodedata
from collections.abc import Iterator, Mapping
from functools import cache
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

UNSPACED = (
    (0x0E00, 0x0EFF),
    (0x1000, 0x109F),
    (0x1780, 0x17FF),
    (0x3000, 0x9FFF),
    (0xF900, 0xFAFF),
    (0xFF65, 0xFF9F),
    (0x20000, 0x3FFFF),
)
"""Code points of scripts without spaces between words: Thai and Lao, Burmese, Khmer, kana and Chinese characters."""


def continuing_tokens(tokenizer_file: Path, vocab_size: int, origin: str = "") -> NDArray[np.bool_]:
    """Return for each token id if it continues a word: (vocab_size,).

    WordPiece marks the tokens that do. Byte-level BPE and SentencePiece mark those that begin one, with the space
    before it; a token that begins with another character than a letter or a digit begins one there too, and so does
    one of a script without spaces. Raises DataError for another kind of tokenizer.
    """
    contents = read_tokenizer_json(tokenizer_file)
    model, continues = contents["model"], np.zeros(vocab_size, np.bool_)
    kinds = set(_types([contents.get("pre_tokenizer"), contents.get("decoder")]))
    vocabulary = _ids(model)
    if model.get("type") == "WordPiece":
        prefix = model.get("continuing_subword_prefix") or WORDPIECE_PREFIX
        found = [number for token, number in vocabulary.items() if token.startswith(prefix) and token != prefix]
    elif kinds & {"ByteLevel", "Metaspace"}:
        code_points = _of_bytes if "ByteLevel" in kinds else _of_text
        found = [number for token, number in vocabulary.items() if _continues(token, code_points(token))]
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


def _continues(token: str, code_points: range) -> bool:
    """Tell whether a token continues a word; it begins with one of these code points."""
    if not token or token[0] in BYTE_SPACES + META_SPACE or not (token[0].isalnum() or ord(token[0]) > 127):
        return False
    return not _is_unspaced(code_points)


def _is_unspaced(code_points: range) -> bool:
    """Tell whether each of these is of a script without spaces, and no mark upon the letter before it."""
    if len(code_points) == 1 and unicodedata.category(chr(code_points[0])).startswith("M"):
        return False
    return any(first <= code_points[0] and code_points[-1] <= last for first, last in UNSPACED)


def _of_text(token: str) -> range:
    return range(ord(token[0]), ord(token[0]) + 1) if token else range(1)


def _of_bytes(token: str) -> range:
    """Return with which code points a token of byte-level BPE may begin: several where it ends within one's bytes."""
    numbers = [_byte_numbers().get(character, 0) for character in token[:4]] or [0]
    lead = numbers[0]
    length = next((size for size, least in ((4, 0xF0), (3, 0xE0), (2, 0xC0)) if lead >= least), 1)
    value = lead if length == 1 else lead & (0x7F >> length)
    for number in numbers[1:length]:
        value = value << 6 | number & 0x3F
    unknown = 6 * max(0, length - len(numbers))
    return range(value << unknown, (value + 1) << unknown)


@cache
def _byte_numbers() -> Mapping[str, int]:
    """Return the bytes by how byte-level BPE writes them: printable ones of Latin-1 as they are, others from 256 on."""
    printable = {*range(0x21, 0x7F), *range(0xA1, 0xAD), *range(0xAE, 0x100)}
    rest = [number for number in range(256) if number not in printable]
    return {chr(number): number for number in printable} | {chr(256 + at): number for at, number in enumerate(rest)}


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
