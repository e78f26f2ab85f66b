"""What the planner and the loader know of a tokenizer without loading it: its file, its size, its special tokens."""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

from bigtrain import strict_json
from bigtrain.config.paths import is_local, local_path
from bigtrain.data.decoding import data_error

TRAIN = "train"
TOKENIZER_KEY = "data.tokenizer"
LARGEST_VOCABULARY = 2**24
"""Token ids; real tokenizers have up to some hundred thousand, and for each id some bytes are held."""
LARGEST_TOKENIZER_BYTES = 64 * 2**20
"""Of a tokenizer.json; the largest in use have about half."""
MOST_TOKENIZER_VALUES = 3_000_000
"""Of its tokens and merges together; the largest in use have two thirds."""

SPECIAL_NAMES: dict[str, tuple[str, ...]] = {
    "pad": ("[PAD]", "<pad>", "<|pad|>", "<|padding|>"),
    "bos": ("[CLS]", "<s>", "<|begin_of_text|>", "<bos>", "<|startoftext|>"),
    "eos": ("[SEP]", "</s>", "<|endoftext|>", "<|end_of_text|>", "<eos>"),
    "mask": ("[MASK]", "<mask>", "<|mask|>"),
    "unk": ("[UNK]", "<unk>", "<|unk|>"),
}
"""The names that BERT, RoBERTa, GPT-2, Llama and their kin give to each special token."""


@dataclass(frozen=True)
class SpecialTokens:
    """The ids of the special tokens, each None where the tokenizer has none. `bos` is BERT's [CLS], `eos` its [SEP]."""

    pad: int | None = None
    bos: int | None = None
    eos: int | None = None
    mask: int | None = None
    unk: int | None = None

    @classmethod
    def of(cls, vocabulary: Mapping[str, int]) -> SpecialTokens:
        """Find the special tokens in a vocabulary by their usual names."""
        first = {
            kind: next((vocabulary[name] for name in names if name in vocabulary), None)
            for kind, names in SPECIAL_NAMES.items()
        }
        return cls(**first)

    @property
    def ids(self) -> frozenset[int]:
        """Return the ids that there are."""
        return frozenset(token for token in asdict(self).values() if token is not None)

    @property
    def filler(self) -> int:
        """Return the id that fills the end of a row: padding, or without such a token any; it is never read."""
        return self.pad if self.pad is not None else self.eos or 0


def tokenizer_path(spec: str, origin: str = "") -> Path | None:
    """Return the tokenizer.json that a path or a folder names, or None for a hub id.

    Raises DataError where the path is written like one but nothing is there.
    """
    if not is_local(spec):
        return None
    path = local_path(spec).absolute()
    if path.is_dir():
        path /= "tokenizer.json"
        if not path.exists():
            raise data_error(
                origin, f"no tokenizer.json in {spec}; name a folder that has one, or write 'train'", TOKENIZER_KEY
            )
    if not path.exists():
        text = f"no such file or folder: {spec}; name a tokenizer.json, or a folder that has one"
        raise data_error(origin, text, TOKENIZER_KEY)
    return path


def read_tokenizer_json(path: Path) -> dict[str, Any]:
    """Return the contents of a tokenizer.json; raises DataError for a file that is none."""
    try:
        contents = strict_json.read(path, LARGEST_TOKENIZER_BYTES, MOST_TOKENIZER_VALUES)
    except (OSError, ValueError) as error:
        raise not_a_tokenizer(path) from error
    if not isinstance(contents, dict) or not isinstance(contents.get("model"), dict):
        raise not_a_tokenizer(path)
    return contents


def vocabulary_size(spec: str, origin: str = "") -> int | None:
    """Return how many token ids a tokenizer has, from its JSON alone; None for a hub id that is not cached.

    Raises DataError for a path where there is no tokenizer.
    """
    path = tokenizer_path(spec, origin)
    if path is None:
        from bigtrain.data.hub import cached_tokenizer_file

        path = cached_tokenizer_file(spec)
        if path is None:
            return None
    contents = read_tokenizer_json(path)
    ids = [*_model_ids(contents["model"].get("vocab", {})), *_added_ids(contents.get("added_tokens") or [])]
    numbers = [token for token in ids if type(token) is int and 0 <= token < LARGEST_VOCABULARY]
    if len(numbers) < len(ids):
        raise not_a_tokenizer(path)
    return max(numbers, default=-1) + 1


def _model_ids(vocabulary: object) -> Iterable[object]:
    """Return what stands where the ids of a model belong, None for what is no vocabulary."""
    if isinstance(vocabulary, dict):
        return vocabulary.values()
    # A Unigram model's vocabulary is a list of (token, score), the others' a mapping of token to id.
    if isinstance(vocabulary, list) and all(isinstance(entry, list) and len(entry) == 2 for entry in vocabulary):
        return range(len(vocabulary))
    return [None]


def _added_ids(added: object) -> list[object]:
    if not isinstance(added, list):
        return [None]
    return [token.get("id") if isinstance(token, dict) else None for token in added]


def not_a_tokenizer(path: Path) -> Exception:
    """Return the error for a file that is no tokenizer.json."""
    return data_error(
        str(path), "the file is no tokenizer.json of the tokenizers library; name one, or write 'train'", TOKENIZER_KEY
    )
