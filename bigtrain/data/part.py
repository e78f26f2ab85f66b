"""One part of a corpus being written: a shard of each split, from consecutive documents."""

from __future__ import annotations

import hashlib
from collections.abc import Iterable, Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any, NamedTuple

import numpy as np
from numpy.typing import NDArray

from bigtrain.config.schema import Family
from bigtrain.data.cache import synced
from bigtrain.data.corpus import SPLITS, Split, SplitCounts
from bigtrain.data.hashing import key_of
from bigtrain.data.vocabulary import SpecialTokens

if TYPE_CHECKING:
    from tokenizers import Encoding

_EMPTY = SplitCounts(0, 0, 0)


class Frame(NamedTuple):
    """The ids that stand before and after each document."""

    before: list[int]
    after: list[int]


def frame_of(family: Family, special: SpecialTokens) -> Frame:
    """Return BERT's [CLS] ... [SEP], or the end token that closes a document of the others."""
    assert special.eos is not None  # the tokenizer was checked
    if family != "bert":
        return Frame([], [special.eos])
    assert special.bos is not None
    return Frame([special.bos], [special.eos])


def held_out(documents: NDArray[np.int64], validation_fraction: float) -> NDArray[np.bool_]:
    """Return which documents evaluate, a pure function of their numbers. The first trains, the second evaluates."""
    chosen: NDArray[np.bool_] = key_of(documents.astype(np.uint64)) < validation_fraction * 2.0**64
    return np.where(documents < len(SPLITS), documents == 1, chosen)


class PartWriter:
    """Writes the files of part `number`: token ids and document bounds of each split."""

    def __init__(self, folder: Path, number: int, dtype: str, before: Mapping[Split, SplitCounts]) -> None:
        self.counts: dict[Split, SplitCounts] = dict.fromkeys(SPLITS, _EMPTY)
        self._before, self._dtype = before, dtype
        self._tokens = {split: _Digested(folder / f"{split}-{number:05d}.tokens") for split in SPLITS}
        self._offsets = {split: _Digested(folder / f"{split}-{number:05d}.offsets") for split in SPLITS}
        for split in SPLITS:
            self._offsets[split].write(np.array([before[split].tokens], np.uint64))

    @property
    def tokens(self) -> int:
        """Return how many tokens the part holds."""
        return sum(count.tokens for count in self.counts.values())

    def add(self, texts: Sequence[str], encodings: Sequence[Encoding], frame: Frame, validation_fraction: float) -> int:
        """Append documents, each put into its frame; return how many tokens they gave. One without any is not kept."""
        ids: dict[Split, list[int]] = {split: [] for split in SPLITS}
        lengths: dict[Split, list[int]] = {split: [] for split in SPLITS}
        sizes = dict.fromkeys(SPLITS, 0)
        kept = [(text, content) for text, encoding in zip(texts, encodings, strict=True) if (content := encoding.ids)]
        first = sum(self._before[split].documents + self.counts[split].documents for split in SPLITS)
        evaluating = held_out(np.arange(first, first + len(kept)), validation_fraction).tolist()
        for (text, content), evaluates in zip(kept, evaluating, strict=True):
            split = SPLITS[evaluates]
            ids[split] += frame.before
            ids[split] += content
            ids[split] += frame.after
            lengths[split].append(len(content) + len(frame.before) + len(frame.after))
            sizes[split] += len(text) if text.isascii() else len(text.encode())
        for split in SPLITS:
            self._append(split, ids[split], lengths[split], sizes[split])
        return sum(map(sum, lengths.values()))

    def close(self) -> dict[str, Any]:
        """Bring all to the disk and return the part's facts: `files`, each with bytes and sha256, and `splits`."""
        files = dict(file.close() for file in (*self._tokens.values(), *self._offsets.values()))
        return {"files": files, "splits": {split: count._asdict() for split, count in self.counts.items()}}

    def release(self) -> None:
        """Close the files, finished or not."""
        for file in (*self._tokens.values(), *self._offsets.values()):
            file.release()

    def _append(self, split: Split, ids: list[int], lengths: list[int], size: int) -> None:
        counts = self.counts[split]
        ends = np.cumsum(np.array(lengths, np.uint64)) + np.uint64(self._before[split].tokens + counts.tokens)
        self._tokens[split].write(np.array(ids, self._dtype))
        self._offsets[split].write(ends)
        self.counts[split] = _sum(counts, SplitCounts(len(lengths), len(ids), size))


def total_counts(parts: Iterable[Mapping[str, Any]]) -> dict[Split, SplitCounts]:
    """Return what the splits of these parts hold together."""
    totals: dict[Split, SplitCounts] = dict.fromkeys(SPLITS, _EMPTY)
    for part in parts:
        for split in SPLITS:
            totals[split] = _sum(totals[split], SplitCounts(**part["splits"][split]))
    return totals


def _sum(one: SplitCounts, other: SplitCounts) -> SplitCounts:
    return SplitCounts(*(left + right for left, right in zip(one, other, strict=True)))


class _Digested:
    def __init__(self, path: Path) -> None:
        self._file = path.open("wb")
        self._name, self._digest, self._bytes = path.name, hashlib.sha256(), 0

    def release(self) -> None:
        self._file.close()

    def write(self, values: np.ndarray[Any, Any]) -> None:
        content = values.tobytes()
        self._file.write(content)
        self._digest.update(content)
        self._bytes += len(content)

    def close(self) -> tuple[str, dict[str, Any]]:
        synced(self._file)
        self.release()
        return self._name, {"bytes": self._bytes, "sha256": self._digest.hexdigest()}
