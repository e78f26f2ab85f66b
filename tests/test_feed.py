"""What brings micro-batches to the device."""

from __future__ import annotations

from typing import Any

import torch

from bigtrain.batch import Batch, unpad
from bigtrain.feed import Feed
from bigtrain.static_shapes import StaticShapes

CPU = torch.device("cpu")


class Copies:
    """Stands for the copies to a GPU; notes what it was given."""

    def __init__(self) -> None:
        self.given: list[Batch] = []

    def bring(self, batch: Batch) -> dict[str, Any]:
        self.given.append(batch)
        return dict(batch)


def rows() -> dict[str, torch.Tensor]:
    ids = torch.arange(16).view(2, 8)
    return {"input_ids": ids, "labels": ids, "document_lengths": torch.tensor([[3, 2], [7, 0]], dtype=torch.int32)}


def same(one: Batch, other: Batch) -> bool:
    pairs = [(one[name], other[name]) for name in one]
    alike = (torch.equal(a, b) if isinstance(a, torch.Tensor) else a == b for a, b in pairs)
    return one.keys() == other.keys() and all(alike)


def test_packed_rows_come_as_one_flat_row_and_others_as_they_are() -> None:
    feed = Feed(CPU)
    assert same(feed.bring(rows()), unpad(rows()))
    pixels = {"pixels": torch.ones(2, 3)}
    assert same(feed.bring(pixels), pixels)


def test_static_shapes_fill_what_is_brought() -> None:
    brought = Feed(CPU, StaticShapes()).bring(rows())
    assert same(brought, StaticShapes().fill(unpad(rows()), 2, 8))
    assert len(brought["input_ids"]) == 16


def test_copies_get_what_is_ready_for_the_device() -> None:
    copies = Copies()
    brought = Feed(CPU, copies=copies).bring(rows())
    assert same(brought, copies.given[0])
    assert same(brought, unpad(rows()))
