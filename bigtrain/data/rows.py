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
from bigtrain.data.pairs import Pairs, pair_keys
from bigtrain.data.shards import TokenRuns
from bigtrain.data.words import continuing_tokens
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
    whole_word_masking: bool = False


class Rows(NamedTuple):
    """B rows of T positions: `document_lengths` is (B, D), zero-filled; what its sum leaves of a row is padding.

    Where documents are pairs, `segment_ids` (B, T) tell the second text's tokens, by 1, and `next_sentence_labels`
    (B, D) if it follows the first, 0, or is from another document, 1.
    """

    input_ids: Ids
    labels: Ids
    document_lengths: NDArray[np.int32]
    segment_ids: Ids | None = None
    next_sentence_labels: Ids | None = None


class RowReader:
    """Reads any rows of a split, each a pure function of (seed, epoch, row)."""

    def __init__(self, corpus: Corpus, split: Split, shape: RowShape, seed: int) -> None:
        pairs = shape.objective == "mlm_nsp"
        self._pairs = Pairs(corpus, split) if pairs else None
        self.index = RowIndex.open(corpus, split, shape.sequence_length, shape.packing, pairs=pairs)
        self._folder = corpus.folder
        self._runs = TokenRuns(corpus.shards(split))
        self._shape, self._seed, self._special = shape, seed, corpus.special_tokens
        ids = np.arange(corpus.vocab_size)
        self._is_special = np.isin(ids, sorted(corpus.special_tokens.ids))
        self._ordinary = ids[~self._is_special]
        self._continues = (
            continuing_tokens(corpus.tokenizer_file, corpus.vocab_size) if shape.whole_word_masking else None
        )

    def __len__(self) -> int:
        return len(self.index)

    def read(self, rows: Ids, epochs: Ids) -> Rows:
        """Return these rows as they are in these epochs, (B,) each; raises DataError for ids of no token."""
        pieces = self.index.pieces(rows)
        keys = key_of(self._seed, epochs.astype(np.uint64), rows.astype(np.uint64))
        pairs = None
        if self._pairs is not None:
            pairs = self._pairs.read(pieces.starts, pieces.lengths, pair_keys(keys, pieces.per_row))
            pieces = pieces._replace(lengths=pairs.lengths)
        held, lengths = self._layout(pieces)
        tokens = self._runs.read(pieces.starts, pieces.lengths).astype(np.int64) if pairs is None else pairs.tokens
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
        maskable = held & ~self._is_special[input_ids]
        probability, continues = self._shape.masking_probability, self._continuing(input_ids, held, pieces.lengths)
        masked = mask_rows(input_ids, held, maskable, keys, probability, self._special.mask, self._ordinary, continues)
        if pairs is None:
            return Rows(*masked, lengths)
        segments, labels = np.zeros_like(input_ids), np.full(lengths.shape, IGNORED_LABEL, np.int64)
        segments[held] = pairs.segments
        labels[lengths > 0] = pairs.labels
        return Rows(*masked, lengths, segments, labels)

    def _continuing(self, input_ids: Ids, held: NDArray[np.bool_], lengths: Ids) -> NDArray[np.bool_] | None:
        """Return which tokens continue a word, (B, T), where words are masked whole; no piece's first one does."""
        if self._continues is None:
            return None
        continues: NDArray[np.bool_] = self._continues[input_ids]
        first = np.zeros(int(held.sum()), np.bool_)
        first[np.cumsum(lengths) - lengths] = True
        continues[held] &= ~first
        return continues

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
