"""Tokenizers trained or loaded: WordPiece for BERT, byte-level BPE for GPT and Llama."""

from __future__ import annotations

import json
import os
import sys
from collections import Counter
from collections.abc import Iterable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from tokenizers import (
    Tokenizer,
    decoders,
    models,
    normalizers,
    pre_tokenizers,
    processors,
    trainers,
)

from bigtrain.config.schema import Family
from bigtrain.data.decoding import data_error
from bigtrain.data.hub import hub_tokenizer_file
from bigtrain.data.vocabulary import (
    LARGEST_VOCABULARY,
    SpecialTokens,
    not_a_tokenizer,
    read_tokenizer_json,
    tokenizer_path,
)

SAMPLE_CHARACTERS = 16 * 2**20
SAMPLE_CHARACTERS_PER_TOKEN = 512
"""Enough for the rarest tokens to be seen; so that a small vocabulary is trained in seconds."""

PROBE = f"{'a' * 48}! 0 é\n"
"""What a tokenizer encodes before it is used: a pattern that never ends on plain text shows itself."""
STANDARD_ERROR = 2

BERT_SPECIAL_TOKENS = ("[PAD]", "[UNK]", "[CLS]", "[SEP]", "[MASK]")
END_OF_TEXT = "<|endoftext|>"
LARGEST_ALPHABET = 1000
"""Characters that a WordPiece vocabulary spells with; rarer ones become [UNK], or they would fill it alone."""


def sample_characters(vocab_size: int) -> int:
    """Return how much text a tokenizer of this size is trained on."""
    return min(SAMPLE_CHARACTERS, SAMPLE_CHARACTERS_PER_TOKEN * vocab_size)


def train_tokenizer(
    texts: Iterable[str], family: Family, vocab_size: int, lowercase: bool, origin: str = ""
) -> Tokenizer:
    """Return a tokenizer of exactly `vocab_size` tokens, the same one for the same texts on any machine.

    Reads at most `sample_characters(vocab_size)` of the texts and holds them. Tokens that training did not need are
    named [unused0], [unused1], ... Raises DataError when `vocab_size` is too small for the alphabet.
    """
    sampled, room = [], sample_characters(vocab_size)
    for text in texts:
        sampled.append(text[:room])
        room -= len(text)
        if room <= 0:
            break
    train = _train_wordpiece if family == "bert" else _train_bytes
    return train(sampled, vocab_size, lowercase, origin)


def load_tokenizer(spec: str, origin: str = "") -> Tokenizer:
    """Load a tokenizer.json, the one of a Hugging Face folder, or of a hub id, without its truncation and padding."""
    path = tokenizer_path(spec, origin) or hub_tokenizer_file(spec, origin)
    return open_tokenizer(path)


def open_tokenizer(path: Path) -> Tokenizer:
    """Load a tokenizer.json; special tokens written out in a text are read as plain text.

    Raises DataError for a file that is no tokenizer.
    """
    read_tokenizer_json(path)
    try:
        with panics_unsaid():
            tokenizer = Tokenizer.from_file(str(path))
            tokenizer.no_truncation()
            tokenizer.no_padding()
            tokenizer.encode_special_tokens = True
            _probe(tokenizer)
    except BaseException as error:
        if not is_of_tokenizers(error):
            raise
        raise not_a_tokenizer(path) from error
    if id_count(tokenizer) > LARGEST_VOCABULARY:
        raise not_a_tokenizer(path)
    return tokenizer


def _probe(tokenizer: Tokenizer) -> None:
    try:
        tokenizer.encode(PROBE, add_special_tokens=False)
    except BaseException as error:
        if type(error) is not Exception:  # which a vocabulary of chosen words alone raises for any other text
            raise


def is_of_tokenizers(error: BaseException) -> bool:
    """Tell whether an error is the library's own: the bare `Exception`, or a panic of its Rust code."""
    return type(error) is Exception or type(error).__name__ == "PanicException"


@contextmanager
def panics_unsaid() -> Iterator[None]:
    """Keep off standard error what Rust writes there before a panic becomes an exception, which is told in one line."""
    sys.stderr.flush()
    kept = os.dup(STANDARD_ERROR)
    try:
        with Path(os.devnull).open("w") as nowhere:
            os.dup2(nowhere.fileno(), STANDARD_ERROR)
            yield
    finally:
        os.dup2(kept, STANDARD_ERROR)
        os.close(kept)


def special_tokens(tokenizer: Tokenizer) -> SpecialTokens:
    """Return the ids of a tokenizer's special tokens."""
    return SpecialTokens.of(tokenizer.get_vocab(with_added_tokens=True))


def id_count(tokenizer: Tokenizer) -> int:
    """Return one more than the largest token id."""
    return max(tokenizer.get_vocab(with_added_tokens=True).values(), default=-1) + 1


def _train_wordpiece(texts: list[str], vocab_size: int, lowercase: bool, origin: str) -> Tokenizer:
    normalizer = normalizers.BertNormalizer(lowercase=lowercase)
    letters = _alphabet(texts, normalizer)
    # The trainer numbers the inner letters in the order of a hash table, which differs from run to run and decides
    # between equally frequent pairs. Named as special tokens they have fixed numbers.
    named = [*BERT_SPECIAL_TOKENS, *(f"##{letter}" for letter in letters)]
    if vocab_size < (needed := len(named) + len(letters)):
        raise _too_small(vocab_size, needed, origin)
    tokenizer = Tokenizer(models.WordPiece(unk_token="[UNK]"))
    tokenizer.normalizer = normalizer
    tokenizer.pre_tokenizer = pre_tokenizers.BertPreTokenizer()
    trainer = trainers.WordPieceTrainer(
        vocab_size=vocab_size,
        special_tokens=named,
        initial_alphabet=letters,
        limit_alphabet=len(letters),
        show_progress=False,
    )
    tokenizer.train_from_iterator(texts, trainer)
    vocabulary = _filled(tokenizer.get_vocab(), vocab_size)
    tokenizer = Tokenizer(models.WordPiece(vocab=vocabulary, unk_token="[UNK]"))
    tokenizer.normalizer = normalizer
    tokenizer.pre_tokenizer = pre_tokenizers.BertPreTokenizer()
    tokenizer.decoder = decoders.WordPiece()
    tokenizer.add_special_tokens(list(BERT_SPECIAL_TOKENS))
    tokenizer.post_processor = processors.TemplateProcessing(
        single="[CLS] $A [SEP]",
        pair="[CLS] $A [SEP] $B:1 [SEP]:1",
        special_tokens=[("[CLS]", vocabulary["[CLS]"]), ("[SEP]", vocabulary["[SEP]"])],
    )
    return tokenizer


def _train_bytes(texts: list[str], vocab_size: int, lowercase: bool, origin: str) -> Tokenizer:
    alphabet = sorted(pre_tokenizers.ByteLevel.alphabet())
    if vocab_size < (needed := len(alphabet) + 1):
        raise _too_small(vocab_size, needed, origin)
    tokenizer = Tokenizer(models.BPE())
    if lowercase:
        folding = [normalizers.NFD(), normalizers.StripAccents(), normalizers.Lowercase(), normalizers.NFC()]
        tokenizer.normalizer = normalizers.Sequence(folding)
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer.decoder = decoders.ByteLevel()
    trainer = trainers.BpeTrainer(
        vocab_size=vocab_size, special_tokens=[END_OF_TEXT], initial_alphabet=alphabet, show_progress=False
    )
    tokenizer.train_from_iterator(texts, trainer)
    contents: dict[str, Any] = json.loads(tokenizer.to_str())
    contents["model"]["vocab"] = _filled(contents["model"]["vocab"], vocab_size)
    return Tokenizer.from_str(json.dumps(contents))


def _alphabet(texts: Iterable[str], normalizer: normalizers.Normalizer) -> list[str]:
    raw: Counter[str] = Counter()
    for text in texts:
        raw.update(text)
    counts: Counter[str] = Counter()
    for letter, count in raw.items():
        for part in normalizer.normalize_str(letter):
            counts[part] += 0 if part.isspace() else count
    ranked = sorted((letter for letter in counts if counts[letter]), key=lambda letter: (-counts[letter], letter))
    return sorted(ranked[:LARGEST_ALPHABET])


def _filled(vocabulary: dict[str, int], vocab_size: int) -> dict[str, int]:
    names = _unused(vocabulary)
    return {**vocabulary, **{next(names): number for number in range(len(vocabulary), vocab_size)}}


def _unused(vocabulary: dict[str, int]) -> Iterator[str]:
    number = 0
    while True:
        if (name := f"[unused{number}]") not in vocabulary:
            yield name
        number += 1


def _too_small(vocab_size: int, needed: int, origin: str) -> Exception:
    text = f"{vocab_size} tokens are too few to spell this text; at least {needed} are needed"
    return data_error(origin, text, "data.vocab_size")
