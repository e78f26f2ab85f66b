"""Offload: what full recompute keeps, each block's input, waits in pinned host memory for the backward pass.

Each input is copied out while its own block computes, and copied back while the block behind it is recomputed; all
copies run on one stream of their own, so they use a host buffer in the order in which they were issued. Memory is held
until its copy is over; torch's record_stream would free it at a moment that nobody can predict.
"""

from __future__ import annotations

import weakref
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any, Protocol

import torch
from torch import Tensor, nn

from bigtrain.errors import InputError
from bigtrain.pinned import Pool

LEAST_BYTES = 1 << 20
"""Smaller tensors stay where they are: their copies would cost more time than they free memory."""


class Copies(Protocol):
    """Copies between a device and the host that run beside the computation. A ticket stands for one under way."""

    def start(self, source: Tensor, target: Tensor) -> Any:
        """Begin a copy after what has been computed so far; return its ticket."""

    def wait(self, ticket: Any) -> None:
        """Let what is computed from now on begin after that copy."""

    def abandon(self, ticket: Any, target: Tensor) -> None:
        """Keep the memory of a copy's target until the copy is over, though nobody will read it."""


class CudaCopies:
    """Copies on a stream of their own; the host waits for none of them."""

    def __init__(self, device: torch.device) -> None:
        self.stream = torch.cuda.Stream(device)  # type: ignore[no-untyped-call]

    def start(self, source: Tensor, target: Tensor) -> torch.cuda.Event:
        """Copy once the current stream is where it now ends: the source is computed, the target's memory free."""
        self.stream.wait_stream(torch.cuda.current_stream(self.stream.device))
        with torch.cuda.stream(self.stream):
            target.copy_(source, non_blocking=True)
            ticket: torch.cuda.Event = self.stream.record_event()
        return ticket

    def wait(self, ticket: torch.cuda.Event) -> None:
        """Make the current stream wait."""
        torch.cuda.current_stream(self.stream.device).wait_event(ticket)

    def abandon(self, ticket: torch.cuda.Event, target: Tensor) -> None:
        """Leave it to the allocator, which asks the stream."""
        target.record_stream(self.stream)


class Parked:
    """A tensor that waits on the host; `back` gives it again."""

    def __init__(self, tensor: Tensor, copies: Copies, pool: Pool) -> None:
        self._copies, self._pool = copies, pool
        self._buffer: Tensor | None = None
        self._arriving: tuple[Any, Tensor] | None = None
        self._origin = (weakref.ref(tensor.untyped_storage()), *_place(tensor))
        # Of a dense layout, the same strides: the block sees again exactly what it saw.
        self._layout = torch.empty_like(tensor, device="meta")
        self._device = tensor.device
        self._buffer = pool.take(tensor.nbytes)
        flat = self._buffer[: tensor.nbytes].view(tensor.dtype)
        self._host = flat.as_strided(tensor.shape, self._layout.stride())
        self._source: Tensor | None = tensor
        self._leaving = copies.start(tensor, self._host)

    def is_of(self, tensor: Tensor) -> bool:
        """Tell whether it was this tensor that was parked, unchanged since."""
        storage, *place = self._origin
        return storage() is tensor.untyped_storage() and tuple(place) == _place(tensor)

    def leave(self) -> None:
        """Let go of the tensor's memory: what is computed from now on may use it. Raises InputError if it changed."""
        if self._source is not None:
            if self._source._version != self._origin[-1]:
                raise InputError(
                    "recompute: a block changed its input in place, and offload needs it as it was; use none"
                )
            self._copies.wait(self._leaving)
            self._source = None

    def fetch(self) -> None:
        """Begin to copy the tensor back, unless that has begun."""
        if self._arriving is None:
            target = torch.empty_strided(
                self._layout.shape, self._layout.stride(), dtype=self._layout.dtype, device=self._device
            )
            self._arriving = (self._copies.start(self._host, target), target)

    def back(self) -> Tensor:
        """Return the tensor on its device."""
        self.fetch()
        assert self._arriving is not None
        (ticket, tensor), self._arriving = self._arriving, None
        self._copies.wait(ticket)
        return tensor

    def __del__(self) -> None:
        if self._arriving is not None:
            self._copies.abandon(*self._arriving)
        if self._buffer is not None:
            self._pool.give_back(self._buffer)


class Offloader:
    """Park the inputs of blocks on the host in forward order, and fetch each one block ahead in the backward pass."""

    def __init__(self, copies: Copies, *, pool: Pool | None = None, least_bytes: int = LEAST_BYTES) -> None:
        self._copies = copies
        self._pool = Pool() if pool is None else pool
        self._least_bytes = least_bytes
        self._parked: list[weakref.ref[Parked]] = []

    def __deepcopy__(self, memo: Any) -> Offloader:
        """Serve the copy of a model too."""
        return self

    @contextmanager
    def inputs(self) -> Iterator[None]:
        """Park the tensors that autograd saves inside: around a checkpointed block, that block's inputs."""
        started: list[Parked] = []

        def pack(tensor: Tensor) -> Tensor | Parked:
            parked = self._park(tensor)
            if parked is None:
                return tensor
            started.append(parked)
            return parked

        with torch.autograd.graph.saved_tensors_hooks(pack, self._unpack):
            yield
        for parked in started:
            parked.leave()

    def _park(self, tensor: Tensor) -> Parked | None:
        """Park an activation; None for what is small, or needs no gradient and so is shared: masks, tables, indices."""
        activation = tensor.is_floating_point() and tensor.requires_grad and not isinstance(tensor, nn.Parameter)
        if not activation or tensor.nbytes < self._least_bytes:
            return None
        live = self._live()
        for parked in live:
            if parked.is_of(tensor):
                return parked
        parked = Parked(tensor.detach(), self._copies, self._pool)
        self._parked = [weakref.ref(each) for each in (*live, parked)]
        return parked

    def _live(self) -> list[Parked]:
        return [parked for reference in self._parked if (parked := reference()) is not None]

    def _unpack(self, packed: Tensor | Parked) -> Tensor:
        if isinstance(packed, Tensor):
            return packed
        tensor = packed.back()
        earlier = self._before(packed)
        if earlier is not None:
            earlier.fetch()
        return tensor

    def _before(self, packed: Parked) -> Parked | None:
        """Return what was parked before this: the backward pass needs it next."""
        live = self._live()
        place = next(number for number, parked in enumerate(live) if parked is packed)
        return live[place - 1] if place else None


def _place(tensor: Tensor) -> tuple[Any, ...]:
    """Return where in its storage a tensor lies, and its version."""
    return tensor.storage_offset(), tensor.shape, tensor.stride(), tensor.dtype, tensor._version
