"""Data: any source into token shards once, shards into rows, rows into this rank's stream of batches.

Nothing heavy is imported with the package: neither torch nor `datasets` nor `tokenizers`.
"""

from __future__ import annotations

import importlib
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from bigtrain.data.build import prepare
    from bigtrain.data.corpus import Corpus, open_corpus
    from bigtrain.data.ensure import ensure_prepared
    from bigtrain.data.loader import Loader, evaluation_batches
    from bigtrain.data.packing import RowIndex, check_rows
    from bigtrain.data.tokenizer import load_tokenizer, train_tokenizer
    from bigtrain.data.vocabulary import SpecialTokens, vocabulary_size

_HOMES = {
    "Corpus": "corpus",
    "Loader": "loader",
    "RowIndex": "packing",
    "check_rows": "packing",
    "SpecialTokens": "vocabulary",
    "ensure_prepared": "ensure",
    "evaluation_batches": "loader",
    "load_tokenizer": "tokenizer",
    "open_corpus": "corpus",
    "prepare": "build",
    "train_tokenizer": "tokenizer",
    "vocabulary_size": "vocabulary",
}

__all__ = [
    "Corpus",
    "Loader",
    "RowIndex",
    "SpecialTokens",
    "check_rows",
    "ensure_prepared",
    "evaluation_batches",
    "load_tokenizer",
    "open_corpus",
    "prepare",
    "train_tokenizer",
    "vocabulary_size",
]


def __getattr__(name: str) -> Any:
    if name not in _HOMES:
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    return getattr(importlib.import_module(f"{__name__}.{_HOMES[name]}"), name)
