"""What brings micro-batches to the device."""

from __future__ import annotations

from types import SimpleNamespace
from typing import Any

import pytest
import torch

from bigtrain.batch import Batch, unpad
from bigtrain.feed import AHEAD, Feed, SideCopies, pinned
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


def test_expanded_tensors_are_made_contiguous_and_sparse_ones_stay(monkeypatch: pytest.MonkeyPatch) -> None:
    def pin(tensor: torch.Tensor) -> torch.Tensor:
        assert tensor.is_contiguous()
        return tensor

    monkeypatch.setattr(torch.Tensor, "pin_memory", pin)
    batch = {"positions": torch.arange(4).expand(3, 4), "sparse": torch.eye(3).to_sparse(), "name": "text"}
    found = pinned(batch)
    assert torch.equal(found["positions"], batch["positions"])  # type: ignore[arg-type]
    assert found["sparse"] is batch["sparse"]
    assert found["name"] == "text"


class Movable:
    """No tensor, but something that can be moved."""

    def __init__(self, calls: list[str]) -> None:
        self._calls = calls

    def to(self, device: torch.device, non_blocking: bool) -> Movable:
        self._calls.append("moved on the stream that computes")
        return self


def test_copies_wait_overlap_and_are_recorded_in_this_order(monkeypatch: pytest.MonkeyPatch) -> None:
    calls: list[str] = []

    def noting(text: str) -> Any:
        return lambda *given: calls.append(text)

    class Aside:
        def __enter__(self) -> None:
            calls.append("copies begin")

        def __exit__(self, *given: object) -> None:
            calls.append("copies end")

    computed = SimpleNamespace(synchronize=noting("host waits"))
    compute = SimpleNamespace(record_event=lambda: computed, wait_stream=noting("computation waits"))
    monkeypatch.setattr(torch.cuda, "Stream", lambda device: None)
    monkeypatch.setattr(torch.cuda, "current_stream", lambda device: compute)
    monkeypatch.setattr(torch.cuda, "stream", lambda stream: Aside())
    monkeypatch.setattr(torch.Tensor, "pin_memory", lambda tensor: calls.append("pinned") or tensor)
    monkeypatch.setattr(torch.Tensor, "record_stream", noting("recorded"))
    copies = SideCopies(CPU)
    batch = {"other": Movable(calls), "ids": torch.ones(2), "name": "text"}
    wanted = ["copies begin", "pinned", "copies end", "computation waits", "recorded"]
    wanted.append("moved on the stream that computes")
    for waits in [[]] * AHEAD + [["host waits"]] * 2:
        calls.clear()
        assert same(copies.bring(batch), batch)
        assert calls == waits + wanted
