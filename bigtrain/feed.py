"""What brings micro-batches to the device: unpadded, of one shape where shapes are static, while the device computes.

The host runs ahead of a GPU, up to a step: the rows of the next micro-batch, and after the last one those of the next
step, are unpadded and on their way while the device still computes. Whatever was not computed was not handed out.
"""

from __future__ import annotations

from collections import deque
from typing import Any

import torch

from bigtrain import batch as batches
from bigtrain.batch import Batch
from bigtrain.static_shapes import StaticShapes

AHEAD = 2
"""Micro-batches that may be on the device, or on their way, beside the one that it computes."""


class Feed:
    """Bring rows of host memory to a device; `shapes` fill packed ones up."""

    def __init__(self, device: torch.device, shapes: StaticShapes | None = None, copies: Any = None) -> None:
        self._device, self._shapes = device, shapes
        self._copies = SideCopies(device) if copies is None and device.type == "cuda" else copies

    def bring(self, rows: Batch) -> dict[str, Any]:
        """Return what a forward pass gets: packed rows as one flat row, others as they are."""
        found = self.prepared(rows)
        return batches.move(found, self._device) if self._copies is None else self._copies.bring(found)

    def prepared(self, rows: Batch) -> Batch:
        """Return the same, on the host."""
        if not batches.is_packed(rows):
            return rows
        flat = batches.unpad(rows)
        return flat if self._shapes is None else self._shapes.fill(flat, *rows["input_ids"].shape)


class SideCopies:
    """Copy to a GPU from pinned memory on a stream of its own, so that copies and computation overlap.

    Copies out of pageable memory, and copies on the stream that computes, would not. Whoever brings a micro-batch waits
    until the one that was brought AHEAD + 1 calls ago is computed: so many lie on the device, however far the host is.
    """

    def __init__(self, device: torch.device) -> None:
        self._device = device
        self._stream = torch.cuda.Stream(device)  # type: ignore[no-untyped-call]
        self._computed: deque[torch.cuda.Event] = deque()

    def bring(self, batch: Batch) -> dict[str, Any]:
        """Return the batch on the device; what is enqueued from now on comes after the copies."""
        compute = torch.cuda.current_stream(self._device)
        self._computed.append(compute.record_event())
        if len(self._computed) > AHEAD:
            self._computed.popleft().synchronize()
        aside = {name: value for name, value in batch.items() if _is_strided(value)}
        with torch.cuda.stream(self._stream):
            moved = batches.move(pinned(aside), self._device)
        compute.wait_stream(self._stream)
        for value in moved.values():
            value.record_stream(compute)  # its memory belongs to the other stream
        # Of others nobody knows what memory they hold: they stay on the stream that computes.
        rest = batches.move({name: value for name, value in batch.items() if name not in aside}, self._device)
        return {name: moved[name] if name in moved else rest[name] for name in batch}


def pinned(batch: Batch) -> dict[str, Any]:
    """Return host tensors in pinned memory, which torch keeps until copies out of it are done; sparse ones stay."""
    on_host = {name for name, value in batch.items() if _is_strided(value) and value.device.type == "cpu"}
    return {name: value.contiguous().pin_memory() if name in on_host else value for name, value in batch.items()}


def _is_strided(value: Any) -> bool:
    return isinstance(value, torch.Tensor) and value.layout is torch.strided
