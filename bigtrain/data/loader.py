"""This rank's stream of batches: its order depends on the seed alone, and any position is reached at once."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from contextlib import closing
from typing import Any

import numpy as np
import torch

from bigtrain.batch import IGNORED_LABEL, Batch
from bigtrain.data.background import ReadAhead
from bigtrain.data.corpus import Corpus, Split
from bigtrain.data.order import RowOrder
from bigtrain.data.packing import require_rows
from bigtrain.data.rows import Ids, Objective, RowReader, Rows, RowShape
from bigtrain.errors import DataError, Fault

DEPTH = 2
"""Batches that are made ahead."""
TOKENS_AT_ONCE = 2**16
"""Batches of fewer are made several at once: the calls for a small one take longer than its numbers."""
EVALUATION_SEED = 20_181_011
"""Evaluations hide the same tokens in every run, whatever its seed, so that their losses can be compared."""


class Loader:
    """Iterate without end over this rank's share of each global batch; rows as in `bigtrain.data.rows.Rows`.

    Global batch k holds the rows k*G to (k+1)*G - 1 of a stream that goes through all rows once an epoch, newly
    shuffled each time; of a mixture, `bigtrain.data.order` draws by the weights. A rank takes its contiguous share.
    Raises DataError for a corpus with fewer rows than one global batch.
    """

    def __init__(
        self,
        corpus: Corpus,
        *,
        split: Split = "train",
        objective: Objective,
        sequence_length: int,
        packing: bool = True,
        masking_probability: float = 0.15,
        whole_word_masking: bool = False,
        global_batch_size: int,
        seed: int,
        rank: int = 0,
        world_size: int = 1,
    ) -> None:
        shape = RowShape(objective, sequence_length, packing, masking_probability, whole_word_masking)
        self._reader = RowReader(corpus, split, shape, seed)
        self._corpus = corpus.folder.name
        self._order, self._global = RowOrder.of(corpus, split, self._reader.index, seed), global_batch_size
        self._share = _share(global_batch_size, rank, world_size)
        self._ahead: ReadAhead[Rows] | None = None
        self._closed = False
        self.position = 0
        """Global batches that were handed out."""
        require_rows(self.rows, global_batch_size, sequence_length)

    @property
    def rows(self) -> int:
        """Return how many rows an epoch has."""
        return len(self._reader)

    def __iter__(self) -> Iterator[Batch]:
        while not self._closed:
            self._ahead = ReadAhead(self._batches(self.position), DEPTH)
            with closing(self._ahead):
                yield from self._handed_out(self._ahead)

    def _handed_out(self, ahead: ReadAhead[Rows]) -> Iterator[Batch]:
        expected = self.position
        for rows in ahead:
            if self._closed or self.position != expected:  # sought meanwhile: what was read ahead is not wanted
                return
            self.position = expected = expected + 1
            yield tensors(rows)

    def seek(self, position: int) -> None:
        """Make `position` the next global batch, in constant time, also in the middle of an iteration."""
        self.position = position

    def close(self) -> None:
        """Stop reading ahead, for good; an iteration under way ends."""
        self._closed = True
        if self._ahead is not None:
            self._ahead.close()

    def state_dict(self) -> dict[str, Any]:
        """Return the position, and the fingerprint of the corpus; the same on every rank."""
        return {"row": self.position * self._global, "corpus": self._corpus}

    def load_state_dict(self, state: Mapping[str, Any], *, other_data: bool = False) -> None:
        """Go on at the global batch where a state was taken, on any number of ranks.

        Raises DataError for a state of another corpus, unless `other_data` allows it.
        """
        if state["corpus"] != self._corpus and not other_data:
            differing = f"corpus {state['corpus']}, now {self._corpus}"
            text = f"the data are not those that the checkpoint was reading ({differing})"
            raise DataError(Fault("", "data", f"{text}; use another --run-dir, or --allow data"))
        self.seek(state["row"] // self._global)

    def _batches(self, position: int) -> Iterator[Rows]:
        each = len(self._share)
        count = max(1, TOKENS_AT_ONCE // (each * self._reader.index.sequence_length))
        while True:
            places = (np.arange(position, position + count)[:, None] * self._global + self._share).ravel()
            yield from _in_parts(self._reader.read(*self._order.rows_at(places)), each)
            position += count


def evaluation_batches(
    corpus: Corpus,
    *,
    split: Split = "validation",
    objective: Objective,
    sequence_length: int,
    packing: bool = True,
    masking_probability: float = 0.15,
    whole_word_masking: bool = False,
    rows_limit: int | None = None,
    micro_batch_size: int,
    rank: int = 0,
    world_size: int = 1,
) -> Iterator[Batch]:
    """Yield this rank's batches of at most `rows_limit` rows of a split, the same ones at every evaluation.

    Rows are drawn from the whole split. All ranks yield equally many batches of equal size, as collective operations
    need: places beyond the rows repeat a row, without its labels.
    """
    shape = RowShape(objective, sequence_length, packing, masking_probability, whole_word_masking)
    reader = RowReader(corpus, split, shape, EVALUATION_SEED)
    order = RowOrder.of(corpus, split, reader.index, EVALUATION_SEED)
    total = min(len(reader), rows_limit or len(reader))
    each = micro_batch_size * world_size
    for start in range(0, total, each):
        width = min(each, -(-(total - start) // world_size) * world_size)
        places = start + np.arange(width).reshape(world_size, -1)[rank]
        rows = reader.read(*order.rows_at(places % total))
        rows.labels[places >= total] = IGNORED_LABEL
        if rows.next_sentence_labels is not None:
            rows.next_sentence_labels[places >= total] = IGNORED_LABEL
        yield tensors(rows)


def tensors(rows: Rows) -> Batch:
    """Return rows as a batch of host tensors."""
    return {name: torch.from_numpy(values) for name, values in rows._asdict().items() if values is not None}


def _in_parts(rows: Rows, each: int) -> Iterator[Rows]:
    """Yield so many rows at a time, with places for as many documents as those have."""
    held = np.count_nonzero(rows.document_lengths, axis=1)
    for start in range(0, len(held), each):
        here, most = slice(start, start + each), held[start : start + each].max()
        segments, follows = rows.segment_ids, rows.next_sentence_labels
        yield Rows(
            rows.input_ids[here],
            rows.labels[here],
            np.ascontiguousarray(rows.document_lengths[here, :most]),
            None if segments is None else segments[here],
            None if follows is None else np.ascontiguousarray(follows[here, :most]),
        )


def _share(global_batch_size: int, rank: int, world_size: int) -> Ids:
    if global_batch_size % world_size:
        text = f"{global_batch_size} rows cannot be shared equally by {world_size} ranks"
        raise DataError(Fault("", "train.global_batch_size", text))
    each = global_batch_size // world_size
    return np.arange(rank * each, (rank + 1) * each)
