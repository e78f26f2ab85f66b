from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from bigtrain.data.corpus import Corpus
from bigtrain.data.words import continuing_tokens
from bigtrain.errors import DataError

TOKENS = ["[MASK]", "walk", "##ing", "##", "Ġwalk", "ing", "'s", "Ċ", ".", "▁run", "7", "é"]


def write(folder: Path, model: dict[str, Any], **parts: Any) -> Path:
    path = folder / "tokenizer.json"
    vocabulary = {token: number for number, token in enumerate(TOKENS)}
    path.write_text(json.dumps({"model": {"vocab": vocabulary, **model}, "added_tokens": [{"id": 0}], **parts}))
    return path


def continuing(path: Path) -> list[str]:
    found = continuing_tokens(path, len(TOKENS))
    assert found.dtype == np.bool_ and found.shape == (len(TOKENS),)
    return [token for token, continues in zip(TOKENS, found, strict=True) if continues]


def test_wordpiece_marks_what_continues(tmp_path: Path) -> None:
    assert continuing(write(tmp_path, {"type": "WordPiece"})) == ["##ing"]
    assert continuing(write(tmp_path, {"type": "WordPiece", "continuing_subword_prefix": "'"})) == ["'s"]


@pytest.mark.parametrize("kind", ["ByteLevel", "Metaspace"])
@pytest.mark.parametrize("part", ["pre_tokenizer", "decoder"])
def test_others_mark_what_begins(tmp_path: Path, kind: str, part: str) -> None:
    nested = {"type": "Sequence", "pretokenizers": [{"type": "Split"}, {"type": kind}]}
    last = [] if kind == "ByteLevel" else ["é"]  # a byte there, with which Chinese characters begin
    assert continuing(write(tmp_path, {"type": "BPE"}, **{part: nested})) == ["walk", "ing", "7", *last]


UNSPACED = ["中", "国人", "の", "カ", "ไ", "𠀀"]
SPACED = ["é", "ж", "한", "ü1", "\u0e35", "\u3099"]
"""The last two are marks upon the letter before them."""


def test_scripts_without_spaces_begin_words(tmp_path: Path) -> None:
    """A token of byte-level BPE may end within a character."""
    from tokenizers.pre_tokenizers import ByteLevel

    def as_bytes(text: str) -> str:
        return ByteLevel(add_prefix_space=False, use_regex=False).pre_tokenize_str(text)[0][0]

    def found(tokens: list[str], kind: str) -> list[str]:
        path = write(tmp_path, {"type": "BPE", "vocab": dict(zip(tokens, range(len(tokens)), strict=True))},
                     decoder={"type": kind}, added_tokens=[])  # fmt: skip
        return [token for token, told in zip(tokens, continuing_tokens(path, len(tokens)), strict=True) if told]

    assert found(UNSPACED + SPACED, "Metaspace") == SPACED
    spaced = list(map(as_bytes, SPACED))
    assert found([*map(as_bytes, UNSPACED), *spaced], "ByteLevel") == spaced
    chinese, thai = as_bytes("中"), as_bytes("ไ")
    parts = [chinese[:1], chinese[:2], chinese[1:], thai[:1], thai[:2], as_bytes("ж")[:1]]
    assert found(parts, "ByteLevel") == [parts[2], parts[3], parts[5]]


def test_unigram_has_a_list(tmp_path: Path) -> None:
    model = {"type": "Unigram", "vocab": [[token, -1.0] for token in TOKENS]}
    assert continuing(write(tmp_path, model, decoder={"type": "Metaspace"})) == ["walk", "ing", "7", "é"]


def test_a_tokenizer_that_does_not_tell_is_refused(tmp_path: Path) -> None:
    with pytest.raises(DataError) as raised:
        continuing_tokens(write(tmp_path, {"type": "WordLevel"}, pre_tokenizer=None), len(TOKENS), "recipe.yaml:9")
    assert str(raised.value).startswith(
        "recipe.yaml:9: train.whole_word_masking: this tokenizer does not tell which tokens continue a word; use false"
    )


def test_trained_tokenizers_tell(bert_corpus: Corpus, gpt_corpus: Corpus) -> None:
    for corpus in (bert_corpus, gpt_corpus):
        found = continuing_tokens(corpus.tokenizer_file, corpus.vocab_size)
        assert 0 < found.sum() < len(found)
        assert not found[sorted(corpus.special_tokens.ids)].any()
