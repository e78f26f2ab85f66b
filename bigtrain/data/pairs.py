"""Pairs of texts for the next-sentence task: the second follows the first, or is of another document of its source.

Texts are runs of tokens, as in the published code, whose "sentences" are arbitrary spans too (Devlin et al. 2018, arXiv
1810.04805, appendix A.2). What a piece of a document becomes is a pure function of its key.
"""

from __future__ import annotations

from typing import NamedTuple

import numpy as np
from numpy.typing import NDArray

from bigtrain.data.corpus import Corpus, Split, require_documents
from bigtrain.data.hashing import Integers, key_of, random_bits
from bigtrain.data.packing import PAIR_FRAME, Counts
from bigtrain.data.shards import TokenRuns
from bigtrain.data.vocabulary import SpecialTokens
from bigtrain.errors import DataError

FOLLOWS, RANDOM = 0, 1
"""Labels of a pair, as transformers numbers them."""

SALT = 0x6E7370
"""Keeps the numbers that draw pairs apart from those that mask the same row."""

Ids = NDArray[np.int64]


class Texts(NamedTuple):
    """Runs of tokens, as starts and lengths (P,) of first and second texts, and the labels of the pairs (P,)."""

    starts_a: Counts
    lengths_a: Counts
    starts_b: Counts
    lengths_b: Counts
    labels: Ids


class Framed(NamedTuple):
    """P pairs one after another, each [CLS] A [SEP] B [SEP]: tokens and segments, lengths (P,) and labels (P,)."""

    tokens: Ids
    segments: Ids
    lengths: Counts
    labels: Ids


class Pairs:
    """Makes pairs of the pieces of a split's documents. Raises DataError where there is no other document to draw."""

    def __init__(self, corpus: Corpus, split: Split) -> None:
        require_documents(corpus, split)
        shards = [shard for shard in corpus.shards(split) if shard.tokens.size]
        self._bounds = [shard.offsets for shard in shards]
        self._first_tokens = np.array([int(shard.offsets[0]) for shard in shards], np.int64)
        self._first_documents = np.cumsum([0, *(len(bounds) - 1 for bounds in self._bounds)])
        held = [source.corpus.counts(split).documents for source in corpus.sources] or [int(self._first_documents[-1])]
        self._first_of_source = np.cumsum([0, *held])
        self._runs = TokenRuns(shards)
        self._special = corpus.special_tokens

    def read(self, starts: Counts, lengths: Counts, keys: Integers) -> Framed:
        """Return the pairs of pieces (P,) that start there, by their keys; `lengths` count the three special tokens."""
        texts = self.draw(starts, lengths - PAIR_FRAME, keys)
        runs = np.stack([texts.starts_a, texts.starts_b], 1).reshape(-1)
        sizes = np.stack([texts.lengths_a, texts.lengths_b], 1).reshape(-1)
        return framed(self._runs.read(runs, sizes).astype(np.int64), texts, self._special)

    def draw(self, starts: Counts, sizes: Counts, keys: Integers) -> Texts:
        """Return the texts of pieces with so many tokens, at least two.

        The first is a piece's beginning, cut at a place where every one is as likely. The second is with even chances
        the rest of the piece, or as many tokens, or all where there are fewer, of another document of the same
        source, each as likely, from a place in it, each as likely.
        """
        cuts, kinds, others, places = random_bits(keys, 4).T
        lengths_a = 1 + _below(cuts, sizes - 1)
        lengths_b = sizes - lengths_a
        labels = np.where(kinds >> np.uint64(63), RANDOM, FOLLOWS)
        drawn = labels == RANDOM
        starts_b = starts + lengths_a
        own = self._documents_of(starts[drawn])
        sources = np.searchsorted(self._first_of_source, own, side="right") - 1
        firsts, ends_of = self._first_of_source[sources], self._first_of_source[sources + 1]
        other = firsts + _below(others[drawn], ends_of - firsts - 1)
        begins, ends = self._contents(other + (other >= own))
        lengths_b[drawn] = np.minimum(lengths_b[drawn], ends - begins)
        starts_b[drawn] = begins + _below(places[drawn], ends - begins - lengths_b[drawn] + 1)
        return Texts(starts, lengths_a, starts_b, lengths_b, labels)

    def _documents_of(self, starts: Counts) -> Counts:
        """Return the numbers of the documents that tokens at these places are in."""
        shards = np.searchsorted(self._first_tokens, starts, side="right") - 1
        found = np.empty_like(starts)
        for shard in np.unique(shards).tolist():
            here = shards == shard
            within = np.searchsorted(self._bounds[shard], starts[here].astype(np.uint64), side="right") - 1
            found[here] = self._first_documents[shard] + within
        return found

    def _contents(self, documents: Counts) -> tuple[Counts, Counts]:
        """Return where these documents begin and end, without their special tokens."""
        shards = np.searchsorted(self._first_documents, documents, side="right") - 1
        begins, ends = np.empty_like(documents), np.empty_like(documents)
        for shard in np.unique(shards).tolist():
            here = shards == shard
            within = documents[here] - self._first_documents[shard]
            begins[here] = self._bounds[shard][within].astype(np.int64) + 1
            ends[here] = self._bounds[shard][within + 1].astype(np.int64) - 1
        return begins, ends


def pair_keys(row_keys: Integers, per_row: Counts) -> Integers:
    """Return a key for each pair of rows that hold so many, from the rows' keys."""
    firsts = np.cumsum(per_row) - per_row
    places = np.arange(int(per_row.sum())) - np.repeat(firsts, per_row)
    return key_of(SALT, np.repeat(row_keys, per_row), places.astype(np.uint64))


def framed(tokens: Ids, texts: Texts, special: SpecialTokens) -> Framed:
    """Put the tokens of texts, A and B in turn, between special tokens."""
    assert special.bos is not None
    assert special.eos is not None
    lengths = texts.lengths_a + texts.lengths_b + PAIR_FRAME
    ends = np.cumsum(lengths)
    begins, middles = ends - lengths, ends - lengths + texts.lengths_a + 1
    whole = np.zeros(int(lengths.sum()), np.int64)
    inside = np.ones(len(whole), np.bool_)
    for places, token in ((begins, special.bos), (middles, special.eos), (ends - 1, special.eos)):
        whole[places], inside[places] = token, False
    if inside.sum() != len(tokens):
        raise DataError("the tokenized data is damaged: texts beyond the end of its tokens; run bigtrain prepare again")
    whole[inside] = tokens
    segments = (np.arange(len(whole)) > np.repeat(middles, lengths)).astype(np.int64)
    return Framed(whole, segments, lengths, texts.labels)


def _below(bits: Integers, limits: Counts) -> Counts:
    """Return a number from 0 to below each limit, each as likely."""
    drawn: Counts = (bits % limits.astype(np.uint64)).astype(np.int64)
    return drawn
