"""The Batch type and what is done to one: cut into micro-batches, weighed, unpadded, moved.

Rows on their way in: `input_ids` and `labels` (B, T), `document_lengths` (B, D), documents in order, zero-filled; what
is left of a row is padding. Flat on their way into a model: `input_ids` and `position_ids` (N,), `cu_seqlens` (K+1,)
int32, `max_seqlen`, a plain int, and the labels: where less than half of the tokens have one, `labels` and
`label_positions` (M,) of those that do, otherwise `labels` (N,) of all. Where documents are pairs of texts, rows also
hold `segment_ids` (B, T), flat (N,), and `next_sentence_labels` (B, D), flat (K,). Where shapes are static, there are
more of each at the end: tokens and labels that do not count, and documents without tokens.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from typing import TYPE_CHECKING, Any, NamedTuple, TypeAlias

if TYPE_CHECKING:
    import torch
    from torch import Tensor

Batch: TypeAlias = Mapping[str, Any]

IGNORED_LABEL = -100
"""The label of a position that does not count, as in torch and transformers."""

PAIR_LABELS = "next_sentence_labels"


class PairLosses(NamedTuple):
    """What a model returns that learns two tasks: the mean loss over labelled tokens, and over pairs of texts."""

    mlm_loss: Tensor
    nsp_loss: Tensor


def count_rows(batch: Batch) -> int:
    """Return the number of sequences: the length of the first dim, which all tensors share."""
    return len(next(iter(batch.values())))


def split(batch: Batch, rows: int) -> Iterator[Batch]:
    """Yield the batch in pieces of so many rows; the last may be shorter."""
    for start in range(0, count_rows(batch), rows):
        yield {name: tensor[start : start + rows] for name, tensor in batch.items()}


def count_labels(batch: Batch, *, shifted: bool) -> int:
    """Return the weight of a batch: its labels that count, or its rows where there are no labels.

    `shifted` says that the model itself moves labels by one position, as transformers' causal models do: the first
    label of each row then never counts.
    """
    labels = batch.get("labels")
    if labels is None:
        return count_rows(batch)
    if shifted:
        labels = labels[..., 1:]
    return int((labels != IGNORED_LABEL).sum())


def count_weights(batch: Batch, *, shifted: bool) -> list[int]:
    """Return the weight of a batch in each loss of the model: its labels, and its pairs if those have labels."""
    pairs = batch.get(PAIR_LABELS)
    more = [] if pairs is None else [int((pairs != IGNORED_LABEL).sum())]
    return [count_labels(batch, shifted=shifted), *more]


def labelled(rows: Batch) -> Batch:
    """Return rows without a label with one, to be given no weight: the mean over none is not a number in most models.

    Packed rows, whose models take the mean over none as 0, and rows whose tensors have no labels stay as they are.
    """
    if is_packed(rows) or "labels" not in rows:
        return rows
    labels = rows["labels"].clone()
    labels.view(-1)[-1] = 0
    return {**rows, "labels": labels}


def is_packed(batch: Batch) -> bool:
    """Tell whether the rows hold documents whose lengths are given, so that padding can be taken out."""
    return "document_lengths" in batch


def unpad(rows: Batch) -> dict[str, Any]:
    """Return the flat batch of packed rows: one row of tokens without padding, and where its documents and labels are.

    Raises ValueError if the documents of a row are longer than the row.
    """
    import torch

    row_length = rows["input_ids"].shape[1]
    row_tokens = rows["document_lengths"].sum(dim=1)
    if int(row_tokens.max()) > row_length:
        raise ValueError(f"document_lengths: {int(row_tokens.max())} tokens in a row of {row_length}")
    kept = torch.arange(row_length) < row_tokens[:, None]
    lengths = rows["document_lengths"][rows["document_lengths"] > 0]
    cu_seqlens = torch.nn.functional.pad(lengths.cumsum(0), (1, 0))
    first_token = torch.repeat_interleave(cu_seqlens[:-1], lengths)
    flat: dict[str, Any] = {
        "input_ids": rows["input_ids"][kept],
        "position_ids": torch.arange(len(first_token)) - first_token,
        "cu_seqlens": cu_seqlens.to(torch.int32),
        "max_seqlen": int(lengths.max()),
    }
    if "labels" in rows:
        labels = rows["labels"][kept]
        positions = (labels != IGNORED_LABEL).nonzero().squeeze(1)
        if 2 * len(positions) < len(labels):
            flat["label_positions"], labels = positions, labels[positions]
        flat["labels"] = labels
    if PAIR_LABELS in rows:
        flat["segment_ids"] = rows["segment_ids"][kept]
        flat[PAIR_LABELS] = rows[PAIR_LABELS][rows["document_lengths"] > 0]
    return flat


def move(batch: Batch, device: torch.device) -> dict[str, Any]:
    """Return the batch on a device; from pinned memory the copies overlap with what the host does next."""
    return {
        name: value.to(device, non_blocking=True) if hasattr(value, "to") else value for name, value in batch.items()
    }
