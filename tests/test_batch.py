"""Batches: cut, weighed, unpadded."""

from __future__ import annotations

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from bigtrain import batch as batches

LENGTHS = st.lists(st.lists(st.integers(1, 5), min_size=1, max_size=4), min_size=1, max_size=5)


def packed(lengths: list[list[int]], row_length: int = 24, apart: int = 3) -> dict[str, torch.Tensor]:
    """Rows whose tokens count up over the whole batch, padding 0, a label on every third token or so of a row."""
    rows, most = len(lengths), max(map(len, lengths))
    batch = {
        "input_ids": torch.zeros(rows, row_length, dtype=torch.int64),
        "labels": torch.full((rows, row_length), -100),
        "document_lengths": torch.zeros(rows, most, dtype=torch.int32),
    }
    token = 1
    for r, documents in enumerate(lengths):
        size = sum(documents)
        batch["input_ids"][r, :size] = torch.arange(token, token + size)
        batch["labels"][r, :size:apart] = batch["input_ids"][r, :size:apart]
        batch["document_lengths"][r, : len(documents)] = torch.tensor(documents)
        token += size
    return batch


@given(LENGTHS)
@settings(max_examples=40, deadline=None)
def test_unpad_keeps_every_token_and_every_boundary(lengths: list[list[int]]) -> None:
    flat = batches.unpad(packed(lengths))
    documents = [length for row in lengths for length in row]
    assert flat["input_ids"].tolist() == list(range(1, sum(documents) + 1))
    assert flat["cu_seqlens"].diff().tolist() == documents
    assert flat["cu_seqlens"].dtype == torch.int32
    assert flat["position_ids"].tolist() == [i for length in documents for i in range(length)]
    assert flat["max_seqlen"] == max(documents)


@given(LENGTHS, st.integers(1, 30))
@settings(max_examples=60, deadline=None)
def test_unpad_keeps_labels_with_their_positions(lengths: list[list[int]], apart: int) -> None:
    rows = packed(lengths, apart=apart)
    flat = batches.unpad(rows)
    count, tokens = batches.count_labels(rows, shifted=False), len(flat["input_ids"])
    assert ("label_positions" in flat) == (2 * count < tokens)
    if "label_positions" in flat:
        assert torch.equal(flat["input_ids"][flat["label_positions"]], flat["labels"])
        assert len(flat["labels"]) == count
    else:
        counted = flat["labels"] != batches.IGNORED_LABEL
        assert torch.equal(flat["input_ids"][counted], flat["labels"][counted])
        assert (len(flat["labels"]), int(counted.sum())) == (tokens, count)


@pytest.mark.parametrize(("labels", "gathered"), [(0, True), (3, True), (4, False), (8, False)])
def test_unpad_gathers_labels_where_less_than_half_of_the_tokens_have_one(labels: int, gathered: bool) -> None:
    rows = packed([[5, 3]], apart=1)
    rows["labels"][0, labels:] = batches.IGNORED_LABEL
    flat = batches.unpad(rows)
    assert ("label_positions" in flat) == gathered
    assert len(flat["labels"]) == (labels if gathered else 8)
    assert flat["labels"][:labels].tolist() == list(range(1, labels + 1))


def test_unpad_without_labels() -> None:
    rows = packed([[3, 2]])
    del rows["labels"]
    assert set(batches.unpad(rows)) == {"input_ids", "position_ids", "cu_seqlens", "max_seqlen"}


def test_unpad_refuses_documents_longer_than_the_row() -> None:
    rows = packed([[3, 2]], row_length=6)
    rows["document_lengths"][0, 0] = 30
    with pytest.raises(ValueError, match="32 tokens in a row of 6"):
        batches.unpad(rows)


@given(LENGTHS, st.integers(1, 6))
@settings(max_examples=40, deadline=None)
def test_split_covers_the_batch_in_order(lengths: list[list[int]], size: int) -> None:
    whole = packed(lengths)
    pieces = list(batches.split(whole, size))
    assert all(batches.count_rows(piece) <= size for piece in pieces)
    for name, tensor in whole.items():
        assert torch.equal(torch.cat([piece[name] for piece in pieces]), tensor)


def test_the_weight_is_the_labels_that_count() -> None:
    labels = torch.tensor([[5, -100, 7], [-100, -100, 9]])
    assert batches.count_labels({"labels": labels}, shifted=False) == 3
    assert batches.count_labels({"labels": labels}, shifted=True) == 2


def test_without_labels_the_weight_is_the_rows() -> None:
    assert batches.count_labels({"pixels": torch.zeros(4, 3)}, shifted=False) == 4


def test_only_rows_with_document_lengths_are_packed() -> None:
    assert batches.is_packed(packed([[1]]))
    assert not batches.is_packed({"input_ids": torch.zeros(1, 1)})


def test_move_leaves_plain_values_alone() -> None:
    moved = batches.move({"input_ids": torch.zeros(2), "max_seqlen": 7}, torch.device("cpu"))
    assert moved["max_seqlen"] == 7
    assert moved["input_ids"].device.type == "cpu"


def test_pairs_keep_their_segments_and_labels() -> None:
    rows = packed([[3, 2], [4], [2, 2, 1]], row_length=6)
    rows["segment_ids"] = torch.arange(18).view(3, 6) % 2
    rows["next_sentence_labels"] = torch.tensor([[0, 1, -100], [1, -100, -100], [-100, 0, 1]])
    flat = batches.unpad(rows)
    assert flat["segment_ids"].tolist() == [0, 1, 0, 1, 0, 0, 1, 0, 1, 0, 1, 0, 1, 0]
    assert flat["next_sentence_labels"].tolist() == [0, 1, 1, -100, 0, 1]
    assert batches.count_weights(rows, shifted=False) == [batches.count_labels(rows, shifted=False), 5]
    assert batches.count_weights(packed([[3]]), shifted=False) == [1]
