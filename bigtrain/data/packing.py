"""Documents into rows: which pieces of which documents lie in each row, computed once and kept beside the corpus."""

from __future__ import annotations

import os
import shutil
from collections.abc import Callable, Iterator
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import IO, Any, NamedTuple

import numpy as np
from numpy.typing import NDArray

from bigtrain.config.checks import SHORTEST_PAIR
from bigtrain.config.schema import Family, Recipe
from bigtrain.data.cache import locked, synced
from bigtrain.data.corpus import Corpus, Split
from bigtrain.data.decoding import data_error
from bigtrain.errors import DataError

WINDOW_DOCUMENTS = 8192
"""Documents that are packed together: enough to fill rows, few enough that memory stays constant."""

ROWS_VERSION = 2
LEAST_PIECE = 2
"""Tokens; a single one leaves nothing to predict: the last of a document, cut off, which has no next or is [SEP]."""
PAIR_FRAME = SHORTEST_PAIR - 2
"""Special tokens of a pair of texts: [CLS] A [SEP] B [SEP]."""

Counts = NDArray[np.int64]


class Pieces(NamedTuple):
    """Runs of tokens: where each starts in its split, how long it is, and how many each row holds in turn."""

    starts: Counts
    lengths: Counts
    per_row: Counts


@dataclass(frozen=True)
class RowIndex:
    """The rows of one split: row i holds pieces offsets[i] to offsets[i + 1]. A piece lies within one document.

    In rows of pairs a piece lies within a document's content and becomes two texts; its length counts, beside its own
    tokens, the three special ones.
    """

    sequence_length: int
    starts: NDArray[np.int64]
    lengths: NDArray[np.int32]
    offsets: NDArray[np.int64]
    folder: Path | None = None

    @classmethod
    def open(
        cls, corpus: Corpus, split: Split, sequence_length: int, packing: bool, *, pairs: bool = False
    ) -> RowIndex:
        """Map a split's rows into memory; packs them first where that was not done yet, one process at a time.

        Raises DataError where the rows are too short for any task, or the index is damaged.
        """
        require_length(corpus.family, sequence_length, pairs=pairs)
        kind = ("packed" if packing else "single") + ("-pairs" if pairs else "")
        name = f"{split}-{sequence_length}-{kind}-{ROWS_VERSION}"
        folder = corpus.folder / "rows" / name
        if not folder.exists():
            with locked(folder.with_suffix(".lock")):
                if not folder.exists():
                    _write(corpus, split, lambda window: _packed(window, sequence_length, packing, pairs), folder)
        try:
            starts, lengths, offsets = (_column(folder, name, dtype) for name, dtype in _COLUMNS)
        except (OSError, ValueError, EOFError) as error:
            raise _damaged(folder) from error
        index = cls(sequence_length, starts, lengths, offsets, folder)
        if not len(index.offsets) or index.offsets[-1] != len(index.starts) or len(index.starts) != len(index.lengths):
            raise _damaged(folder)
        return index

    def __len__(self) -> int:
        return len(self.offsets) - 1

    def pieces(self, rows: Counts) -> Pieces:
        """Return the pieces of these rows, in their order. Raises DataError where no row can be like that."""
        begins, ends = self.offsets[rows], self.offsets[rows + 1]
        per_row = ends - begins
        if ((begins < 0) | (per_row < 1) | (per_row > self.sequence_length) | (ends > len(self.starts))).any():
            raise _damaged(self.folder)
        places = spans(begins, per_row)
        starts, lengths = self.starts[places], self.lengths[places].astype(np.int64)
        sums = np.add.reduceat(lengths, np.cumsum(per_row) - per_row) if len(rows) else lengths
        if (starts < 0).any() or (lengths < 1).any() or (sums > self.sequence_length).any():
            raise _damaged(self.folder)
        return Pieces(starts, lengths, per_row)

    @property
    def fill(self) -> float:
        """Return the share of the rows' positions that hold a token."""
        return float(self.lengths.sum(dtype=np.int64)) / max(1, len(self) * self.sequence_length)


def check_rows(recipe: Recipe, corpus: Corpus) -> int:
    """Return how many rows an epoch of a recipe has; raises DataError where they are fewer than one global batch."""
    data, needed, pairs = recipe.data, recipe.train.global_batch_size, recipe.train.objective == "mlm_nsp"
    require_length(recipe.model.family, data.sequence_length, recipe.origin("data.sequence_length"), pairs=pairs)
    rows = len(RowIndex.open(corpus, "train", data.sequence_length, data.packing, pairs=pairs))
    require_rows(rows, needed, data.sequence_length, recipe.origin("train.global_batch_size"))
    return rows


def require_length(family: Family, sequence_length: int, origin: str = "", *, pairs: bool = False) -> None:
    """Raise DataError where rows are so short that nothing in them can be predicted."""
    least = SHORTEST_PAIR if pairs else 3 if family == "bert" else 2
    if sequence_length < least:
        text = f"rows of {sequence_length} tokens leave nothing to predict for {family}; use at least {least}"
        raise data_error(origin, text, "data.sequence_length")


def require_rows(rows: int, needed: int, sequence_length: int, origin: str = "") -> None:
    """Raise DataError where there are fewer rows than one global batch needs."""
    if rows < needed:
        text = (
            f"the data gives {rows} rows of {sequence_length} tokens, fewer than one batch of {needed}; "
            f"use at most {rows}, a smaller data.sequence_length, or more data"
        )
        raise data_error(origin, text, "train.global_batch_size")


def spans(begins: Counts, counts: Counts) -> Counts:
    """Return begins[0], begins[0] + 1, ... (counts[0] numbers), then those from begins[1], and so on."""
    before = np.cumsum(counts) - counts
    numbers: Counts = np.arange(counts.sum(), dtype=np.int64) + np.repeat(begins - before, counts)
    return numbers


def cut(offsets: Counts, sequence_length: int) -> tuple[Counts, Counts]:
    """Return starts and lengths of the pieces, of at most `sequence_length` tokens, of documents with these bounds."""
    return _cut(offsets[:-1], offsets[1:], sequence_length)


def cut_pairs(offsets: Counts, sequence_length: int) -> tuple[Counts, Counts]:
    """Return the pieces of documents' contents, between their first and last token, that become pairs of texts.

    Lengths count the special tokens that a pair has.
    """
    starts, lengths = _cut(offsets[:-1] + 1, offsets[1:] - 1, sequence_length - PAIR_FRAME)
    return starts, lengths + PAIR_FRAME


def _cut(begins: Counts, ends: Counts, longest: int) -> tuple[Counts, Counts]:
    counts = -(-(ends - begins) // longest)
    numbers = spans(np.zeros_like(counts), counts)
    starts = np.repeat(begins, counts) + numbers * longest
    return starts, np.minimum(np.repeat(ends, counts) - starts, longest)


def pack(lengths: Counts, sequence_length: int) -> Counts:
    """Return the row of each piece by best-fit decreasing, rows numbered from 0.

    The longest piece first, each into the fullest row that has room for it. Rows by the room that they have left are
    found through the bits of one integer, so that a piece costs the same however many rows are open.
    """
    rows = np.empty(len(lengths), np.int64)
    with_room: list[list[int]] = [[] for _ in range(sequence_length + 1)]
    rooms = opened = 0
    order = np.argsort(-lengths, kind="stable")
    for piece, length in zip(order.tolist(), lengths[order].tolist(), strict=True):
        if fitting := rooms >> length:
            room = length + (fitting & -fitting).bit_length() - 1
            row = with_room[room].pop()
            if not with_room[room]:
                rooms ^= 1 << room
        else:
            row, room = opened, sequence_length
            opened += 1
        rows[piece] = row
        if left := room - length:
            with_room[left].append(row)
            rooms |= 1 << left
    return rows


def _packed(offsets: Counts, sequence_length: int, packing: bool, pairs: bool = False) -> Pieces:
    starts, lengths = (cut_pairs if pairs else cut)(offsets, sequence_length)
    useful = lengths >= (SHORTEST_PAIR if pairs else LEAST_PIECE)
    starts, lengths = starts[useful], lengths[useful]
    if not packing:
        return Pieces(starts, lengths, np.ones_like(starts))
    whole = lengths == sequence_length
    rows = pack(lengths[~whole], sequence_length)
    order = np.argsort(rows, kind="stable")  # within a row the order of the source stays
    short_starts, short_lengths = starts[~whole][order], lengths[~whole][order]
    return Pieces(
        np.concatenate([starts[whole], short_starts]),
        np.concatenate([lengths[whole], short_lengths]),
        np.concatenate([np.ones(int(whole.sum()), np.int64), np.bincount(rows)]),
    )


def _windows(corpus: Corpus, split: Split) -> Iterator[Counts]:
    for shard in corpus.shards(split):
        for begin in range(0, len(shard.offsets) - 1, WINDOW_DOCUMENTS):
            bounds = shard.offsets[begin : begin + WINDOW_DOCUMENTS + 1]
            if (bounds[1:] < bounds[:-1]).any() or bounds[-1] > shard.offsets[-1]:
                text = f"the bounds of its documents are damaged; delete the folder {corpus.folder} and run again"
                raise data_error(str(corpus.folder), text, "data.cache")
            yield bounds.astype(np.int64)


def _damaged(folder: Path | None) -> DataError:
    text = f"the row index is damaged; delete the folder {folder or 'rows'} and run again"
    return data_error(str(folder or ""), text, "data.cache")


def _column(folder: Path, name: str, dtype: str) -> NDArray[Any]:
    """Map one array of an index. Raises ValueError for a file that holds another thing."""
    found = np.load(folder / f"{name}.npy", mmap_mode="r", allow_pickle=False)
    if not isinstance(found, np.ndarray) or found.dtype != dtype or found.ndim != 1:
        raise ValueError(f"{name}: no flat array of {dtype}")
    return found


def _write(corpus: Corpus, split: Split, packed: Callable[[Counts], Pieces], folder: Path) -> None:
    aside = folder.with_name(f"{folder.name}.{os.getpid()}.aside")
    shutil.rmtree(aside, ignore_errors=True)
    aside.mkdir(parents=True)
    held = 0
    with ExitStack() as files:
        starts, lengths, offsets = (
            files.enter_context(_growing_array(aside / f"{name}.npy", dtype)) for name, dtype in _COLUMNS
        )
        offsets(np.zeros(1, np.int64))
        for window in _windows(corpus, split):
            pieces = packed(window)
            starts(pieces.starts)
            lengths(pieces.lengths)
            offsets(held + np.cumsum(pieces.per_row))
            held += len(pieces.starts)
    aside.rename(folder)


_COLUMNS = (("starts", "<i8"), ("lengths", "<i4"), ("offsets", "<i8"))


@contextmanager
def _growing_array(path: Path, dtype: str) -> Iterator[Callable[[NDArray[Any]], None]]:
    """Give a function that appends to a .npy file, whose header leaves room for the length that is known at the end."""
    count = 0

    def append(values: NDArray[Any]) -> None:
        nonlocal count
        file.write(values.astype(dtype).tobytes())
        count += len(values)

    with path.open("wb") as file:
        _write_header(file, dtype, count)
        begin = file.tell()
        yield append
        file.seek(0)
        _write_header(file, dtype, count)
        assert file.tell() == begin
        synced(file)


def _write_header(file: IO[bytes], dtype: str, count: int) -> None:
    np.lib.format.write_array_header_1_0(file, {"descr": dtype, "fortran_order": False, "shape": (count,)})
