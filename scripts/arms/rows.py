"""The rows that the arms train on, as each of them wants its own.

`full`: rows of one document each, tokens drawn evenly; the same few steps' rows come again and again, so that losses
fall and tell the arms apart. `documents`: lengths drawn from a log-normal distribution cut at the row's length T.
bigtrain packs them; transformers has one in each row and pads to the longest of a micro-batch, as its collators do; the
plain loop lays them end to end, and attends across them. `loader`: bigtrain's packed rows of real text; the others read
the same rows as one document each.

In ours and the plain loop's, a causal label is the token that follows; transformers moves labels itself.
"""

from __future__ import annotations

from statistics import NormalDist
from typing import Any

import numpy as np
import torch

from arms.job import WARM_UP_STEPS, CannotRun, Job

IGNORED = -100
MASK_TOKEN, FIRST_TOKEN = 4, 5
SHORTEST = 8
DISTINCT_STEPS = 4
SPREAD = 0.8
"""Standard deviation of the logarithm of a document's length."""

Document = tuple[np.ndarray[Any, Any], np.ndarray[Any, Any]]
"""Tokens, and labels at their own places: masked ones for BERT, the tokens themselves otherwise."""


class Source:
    """Rows of a job; `plan` is that of its recipe."""

    def __init__(self, plan: Any, job: Job) -> None:
        self._plan, self._mode = plan, job.mode
        self._length = plan.recipe.data.sequence_length
        self._rows = plan.recipe.train.global_batch_size
        self._mean = job.mean_length
        self._steps = job.steps + WARM_UP_STEPS
        self._draw = np.random.default_rng(1)
        if plan.recipe.train.objective == "mlm_nsp":
            raise CannotRun("pairs of texts; only mlm and clm are compared")

    def packed(self) -> list[dict[str, Any]]:
        """Return the batch of each step as bigtrain's loader would give it."""
        if self._mode == "loader":
            return self._loaded()
        if self._mode == "full":
            some = [self._batch([[self._document(self._length)] for _ in range(self._rows)]) for _ in self._distinct()]
            return [some[step % len(some)] for step in range(self._steps)]
        return self._packed_documents()

    def rows(self) -> tuple[list[dict[str, Any]], list[int]]:
        """Return rows as transformers wants them, step by step, and the real tokens of each step."""
        if self._mode == "documents":
            found = [self._document(length) for length in self._lengths(self._rows * self._steps)]
            rows = [self._row(torch.from_numpy(ids), torch.from_numpy(labels)) for ids, labels in found]
            lengths = np.array([len(ids) for ids, _ in found]).reshape(self._steps, -1)
            return rows, lengths.sum(axis=1).tolist()
        rows, tokens = [], []
        for batch in self.packed():
            ids, labels = batch["input_ids"], batch["labels"]
            if self._plan.model.causal:
                held = torch.arange(self._length) < batch["document_lengths"].sum(dim=1)[:, None]
                labels = torch.where(held, ids, IGNORED)
            rows += [self._row(one, other) for one, other in zip(ids, labels, strict=True)]
            tokens.append(int(batch["document_lengths"].sum()))
        return rows, tokens

    def _row(self, ids: torch.Tensor, labels: torch.Tensor) -> dict[str, Any]:
        """Return a row as transformers counts it: a causal row's first label is moved away, and must not count."""
        if self._plan.model.causal:
            labels = labels.clone()
            labels[0] = IGNORED
        return {"input_ids": ids, "labels": labels}

    def end_to_end(self) -> list[tuple[torch.Tensor, torch.Tensor, int]]:
        """Return ids and labels (B, T) of each step, and its real tokens; documents lie one after another."""
        if self._mode != "documents":
            batches = self.packed()
            return [(one["input_ids"], one["labels"], int(one["document_lengths"].sum())) for one in batches]
        size = self._steps * self._rows * self._length
        found = [self._document(length) for length in self._lengths(2 * size // self._mean)]
        ids = np.concatenate([ids for ids, _ in found])[:size]
        labels = np.concatenate([self._following(labels) for _, labels in found])[:size]
        shape = (self._steps, self._rows, self._length)
        cut = zip(torch.from_numpy(ids).view(shape), torch.from_numpy(labels).view(shape), strict=True)
        return [(one, other, one.numel()) for one, other in cut]

    def attended_length(self) -> int:
        """Return the length at which a token attends, by which attention is counted: the mean over tokens."""
        if self._mode != "documents":
            return int(self._length)
        lengths = self._lengths(4096)
        return round(float((lengths**2).sum() / lengths.sum()))

    def _distinct(self) -> range:
        return range(min(DISTINCT_STEPS, self._steps))

    def _loaded(self) -> list[dict[str, Any]]:
        from bigtrain.data.ensure import ensure_prepared
        from bigtrain.training.build import build_loader

        loader = build_loader(self._plan, ensure_prepared(self._plan.recipe, aside=True))
        found = [dict(batch) for batch, _ in zip(loader, range(self._steps), strict=False)]
        loader.close()
        return found

    def _document(self, length: int) -> Document:
        ids = self._draw.integers(FIRST_TOKEN, self._plan.model.vocab_size, length)
        if self._plan.model.causal:
            return ids, ids
        count = max(1, round(self._plan.recipe.train.masking_probability * length))
        places = self._draw.permutation(length)[:count]
        labels = np.full(length, IGNORED)
        labels[places] = ids[places]
        ids[places] = MASK_TOKEN
        return ids, labels

    def _following(self, labels: np.ndarray[Any, Any]) -> np.ndarray[Any, Any]:
        """Return labels as ours and the plain loop take them."""
        return np.append(labels[1:], IGNORED) if self._plan.model.causal else labels

    def _lengths(self, count: int) -> np.ndarray[Any, Any]:
        """Return lengths in a random order: one from each of so many equal parts of the distribution."""
        normal = NormalDist()
        parts = np.exp([SPREAD * normal.inv_cdf((part + 0.5) / count) for part in range(count)])
        low, high = 1.0, 100.0 * self._length
        for _ in range(60):  # the factor at which lengths that are cut have the mean that is asked for
            middle = (low * high) ** 0.5
            short = self._cut(parts * middle).mean() < self._mean
            low, high = (middle, high) if short else (low, middle)
        return self._draw.permutation(self._cut(parts * low))

    def _cut(self, lengths: np.ndarray[Any, Any]) -> np.ndarray[Any, Any]:
        cut: np.ndarray[Any, Any] = np.rint(lengths.clip(SHORTEST, self._length)).astype(np.int64)
        return cut

    def _packed_documents(self) -> list[dict[str, Any]]:
        from bigtrain.data.packing import pack

        wanted = self._steps * self._rows
        lengths = self._lengths(int(1.3 * wanted * self._length / self._mean) + 64)
        places = pack(lengths, self._length)
        found: list[list[Document]] = [[] for _ in range(int(places.max()) + 1)]
        for length, place in zip(lengths.tolist(), places.tolist(), strict=True):
            found[place].append(self._document(length))
        order = self._draw.permutation(len(found) - 1)[:wanted]  # the last row is what was left over
        rows = [found[number] for number in order]
        return [self._batch(rows[start : start + self._rows]) for start in range(0, wanted, self._rows)]

    def _batch(self, rows: list[list[Document]]) -> dict[str, Any]:
        shape = (len(rows), self._length)
        ids, labels = np.zeros(shape, np.int64), np.full(shape, IGNORED)
        lengths = np.zeros((len(rows), max(map(len, rows))), np.int32)
        for number, documents in enumerate(rows):
            held = np.concatenate([document for document, _ in documents])
            ids[number, : len(held)] = held
            labels[number, : len(held)] = np.concatenate([self._following(one) for _, one in documents])
            lengths[number, : len(documents)] = [len(document) for document, _ in documents]
        names = ("input_ids", "labels", "document_lengths")
        return {name: torch.from_numpy(values) for name, values in zip(names, (ids, labels, lengths), strict=True)}


def padded(rows: list[dict[str, Any]]) -> dict[str, torch.Tensor]:
    """Collate rows as DataCollatorForLanguageModeling does, padded to the longest, the masking being done already."""
    ids = torch.nn.utils.rnn.pad_sequence([row["input_ids"] for row in rows], batch_first=True)
    labels = torch.nn.utils.rnn.pad_sequence(
        [row["labels"] for row in rows], batch_first=True, padding_value=float(IGNORED)
    )
    lengths = torch.tensor([len(row["input_ids"]) for row in rows])
    mask = (torch.arange(ids.shape[1]) < lengths[:, None]).long()
    return {"input_ids": ids, "labels": labels, "attention_mask": mask}
