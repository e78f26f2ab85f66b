"""Rows of tokens out of a corpus: which row each place of the stream holds, gathered, labelled, masked."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Literal, NamedTuple, TypeAlias

import numpy as np
from numpy.typing import NDArray

from bigtrain.batch import IGNORED_LABEL
from bigtrain.data.corpus import Corpus, Split
from bigtrain.data.hashing import key_of
from bigtrain.data.masking import mask_rows
from bigtrain.data.packing import Pieces, RowIndex
from bigtrain.data.shards import TokenRuns
from bigtrain.errors import DataError, Fault

Objective: TypeAlias = Literal["mlm", "clm", "mlm_nsp"]
Ids = NDArray[np.int64]


@dataclass(frozen=True)
class RowShape:
    """How documents become rows, and rows a task."""

    objective: Objective
    sequence_length: int
    packing: bool
    masking_probability: float = 0.15


class Rows(NamedTuple):
    """B rows of T positions: `document_lengths` is (B, D), zero-filled; what its sum leaves of a row is padding."""

    input_ids: Ids
    labels: Ids
    document_lengths: NDArray[np.int32]


class RowReader:
    """Reads any rows of a split, each a pure function of (seed, epoch, row)."""

    def __init__(self, corpus: Corpus, split: Split, shape: RowShape, seed: int) -> None:
        if shape.objective == "mlm_nsp":
            raise DataError(Fault("", "train.objective", "rows hold no pairs of sentences; use mlm"))
        self.index = RowIndex.open(corpus, split, shape.sequence_length, shape.packing)
        self._folder = corpus.folder
        self._runs = TokenRuns(corpus.shards(split))
        self._shape, self._seed, self._special = shape, seed, corpus.special_tokens
        ids = np.arange(corpus.vocab_size)
        self._is_special = np.isin(ids, sorted(corpus.special_tokens.ids))
        self._ordinary = ids[~self._is_special]

    def __len__(self) -> int:
        return len(self.index)

    def read(self, rows: Ids, epochs: Ids) -> Rows:
        """Return these rows as they are in these epochs, (B,) each; raises DataError for ids of no token."""
        pieces = self.index.pieces(rows)
        held, lengths = self._layout(pieces)
        tokens = self._runs.read(pieces.starts, pieces.lengths).astype(np.int64)
        if len(tokens) != held.sum():
            raise self._damaged("rows beyond the end of its tokens")
        if (largest := int(tokens.max(initial=0))) >= len(self._is_special):
            raise self._damaged(f"a token id {largest} in a vocabulary of {len(self._is_special)}")
        input_ids = np.full(held.shape, self._special.filler, np.int64)
        input_ids[held] = tokens
        if self._shape.objective == "clm":
            labels = np.full(held.shape, IGNORED_LABEL, np.int64)
            labels[held] = next_tokens(tokens, pieces.lengths)
            return Rows(input_ids, labels, lengths)
        assert self._special.mask is not None  # the tokenizer was checked
        keys = key_of(self._seed, epochs.astype(np.uint64), rows.astype(np.uint64))
        maskable = held & ~self._is_special[input_ids]
        probability = self._shape.masking_probability
        return Rows(
            *mask_rows(input_ids, held, maskable, keys, probability, self._special.mask, self._ordinary), lengths
        )

    def _damaged(self, how: str) -> DataError:
        what = f"the tokenized data is damaged: {how}"
        instead = f"delete the folder {self._folder} and run bigtrain prepare again"
        return DataError(Fault(str(self._folder), "data.cache", f"{what}; {instead}"))

    def _layout(self, pieces: Pieces) -> tuple[NDArray[np.bool_], NDArray[np.int32]]:
        """Return which positions hold a token, (B, T), and the lengths of each row's pieces, (B, D)."""
        present = np.arange(int(pieces.per_row.max(initial=1))) < pieces.per_row[:, None]
        lengths = np.zeros(present.shape, np.int32)
        lengths[present] = pieces.lengths
        return np.arange(self._shape.sequence_length) < lengths.sum(axis=1)[:, None], lengths


def next_tokens(tokens: Ids, lengths: Ids) -> Ids:
    """Return the token after each one in runs that lie one after another; a run's last has none, so no label."""
    following = np.empty_like(tokens)
    following[:-1] = tokens[1:]
    following[np.cumsum(lengths) - 1] = IGNORED_LABEL
    return following
