"""Optimizer states, and with `everything` weights and gradients, that are on the host: pieces of them visit the device.

While one piece is updated the next arrives and the one before leaves. Each direction has a stream of its own, since the
link carries both at a time; nobody waits on the host, which has issued the next piece's copies long before the device
is there.
"""

from __future__ import annotations

from collections.abc import Collection, Iterable, Mapping, Sequence
from typing import Any, Protocol

import torch
from torch import Tensor

from bigtrain import pinned
from bigtrain.optim.cost import STAGES, staged_bytes
from bigtrain.optim.pieces import Views

Pairs = Sequence[tuple[Tensor, Tensor]]
"""Tensors on the host, each with the one on the device that visits for it."""


class Copies(Protocol):
    """Copies in both directions that run beside the computation, in slots that are used again and again."""

    def begin(self) -> None:
        """Let copies start after what has been computed so far."""

    def fetch(self, pairs: Pairs) -> None:
        """Copy to the device, after what was sent to the same tensors; what is computed from now on comes after it."""

    def send(self, pairs: Pairs) -> None:
        """Copy to the host what has been computed so far."""

    def leave(self, slot: int) -> None:
        """Note that nothing later reads or writes a slot for what it holds now."""

    def enter(self, slot: int) -> None:
        """Let fetching wait until what a slot held is used and sent."""

    def end(self) -> None:
        """Let what is computed from now on come after all copies."""


class PlainCopies:
    """Copies where the host's memory is the device's: done when they return."""

    def begin(self) -> None:
        """Do nothing."""

    def fetch(self, pairs: Pairs) -> None:
        """Copy."""
        for host, visitor in pairs:
            visitor.copy_(host)

    def send(self, pairs: Pairs) -> None:
        """Copy back."""
        for host, visitor in pairs:
            host.copy_(visitor)

    def leave(self, slot: int) -> None:
        """Do nothing."""

    def enter(self, slot: int) -> None:
        """Do nothing."""

    def end(self) -> None:
        """Do nothing."""


class CudaCopies:
    """Copies on two streams; the host waits for none of them."""

    def __init__(self, device: torch.device) -> None:
        self._device = device
        self.arriving, self.leaving = (torch.cuda.Stream(device) for _ in range(2))  # type: ignore[no-untyped-call]
        self._left: dict[int, torch.cuda.Event] = {}
        """When what was sent last to an address of the host is there: LAMB reads again what it has sent."""
        self._used: dict[int, tuple[torch.cuda.Event, torch.cuda.Event]] = {}

    def begin(self) -> None:
        """Start after the gradients are there and the memory of the slots is free."""
        self.arriving.wait_stream(self._current())

    def fetch(self, pairs: Pairs) -> None:
        """Copy on the one stream."""
        for event in {self._left[host.data_ptr()] for host, _ in pairs if host.data_ptr() in self._left}:
            self.arriving.wait_event(event)
        with torch.cuda.stream(self.arriving):
            for host, visitor in pairs:
                visitor.copy_(host, non_blocking=True)
        self._current().wait_event(self.arriving.record_event())

    def send(self, pairs: Pairs) -> None:
        """Copy on the other."""
        self.leaving.wait_stream(self._current())
        with torch.cuda.stream(self.leaving):
            for host, visitor in pairs:
                host.copy_(visitor, non_blocking=True)
        event = self.leaving.record_event()
        self._left.update((host.data_ptr(), event) for host, _ in pairs)

    def leave(self, slot: int) -> None:
        """Note where both streams are that read the slot."""
        self._used[slot] = self._current().record_event(), self.leaving.record_event()

    def enter(self, slot: int) -> None:
        """Wait for where they were."""
        for event in self._used.pop(slot, ()):
            self.arriving.wait_event(event)

    def end(self) -> None:
        """Make the current stream wait, so that the allocator may give the slots' memory to whatever comes next."""
        for stream in (self.arriving, self.leaving):
            self._current().wait_stream(stream)
        self._left.clear()
        self._used.clear()

    def _current(self) -> torch.cuda.Stream:
        return torch.cuda.current_stream(self._device)


class Staging:
    """Where the pieces of one optimizer visit. One piece at a time is worked on.

    Tensors on the host may be read by it after `close` and what synchronises with the device.
    """

    def __init__(self, device: torch.device, *, everything: bool = False) -> None:
        self.device, self.everything = device, everything
        self._copies: Copies = CudaCopies(device) if device.type == "cuda" else PlainCopies()
        self._slots: list[Tensor] = []
        """Memory on the device from the first piece of a step to its end."""
        self._slot = self._filled = 0
        self._origins: dict[int, Tensor] = {}
        """What the visitors of this piece are of, by their address."""

    def zeros(self, like: Mapping[str, Tensor], resident: Collection[str]) -> dict[str, Tensor]:
        """Return a new state in these shapes and dtypes: on the host, but for the resident tensors."""
        host = host_tensors({key: tensor for key, tensor in like.items() if key not in resident})
        return {key: host.get(key, torch.zeros_like(tensor, device=self.device)) for key, tensor in like.items()}

    def placed(self, state: Mapping[str, Any], resident: Collection[str]) -> dict[str, Any]:
        """Return a copy of a state in the places that `zeros` would give it."""
        tensors = {key: value for key, value in state.items() if isinstance(value, Tensor)}
        made = self.zeros({key: torch.empty_like(value, device="meta") for key, value in tensors.items()}, resident)
        for key, value in tensors.items():
            made[key].copy_(value)
        return {**state, **made}

    def begin(self, views: Iterable[Tensor]) -> None:
        """Begin a piece of which these tensors on the host may visit the device: those before them have been sent."""
        needed = staged_bytes(view.nbytes for view in views)
        if not self._slots or needed > self._slots[0].nbytes:
            self.close()
            room = torch.empty(STAGES * needed, dtype=torch.uint8, device=self.device)
            self._slots = list(torch.split(room, needed)) if needed else [room] * STAGES
            self._copies.begin()
        self._copies.leave(self._slot)
        self._slot = (self._slot + 1) % STAGES
        self._copies.enter(self._slot)
        self._filled = 0
        self._origins.clear()

    def fetch(self, views: Views) -> Views:
        """Return the visitors of flat tensors on the host; what is done to them counts once they are sent."""
        visitors = tuple(self._visitor(view) for view in views)
        if visitors:
            self._copies.fetch(list(zip(views, visitors, strict=True)))
        return visitors

    def send(self, touched: Iterable[Tensor]) -> None:
        """Copy those back that are visitors."""
        pairs = [(self._origins[view.data_ptr()], view) for view in touched if view.data_ptr() in self._origins]
        if pairs:
            self._copies.send(pairs)

    def close(self) -> None:
        """End a step, or what there is of it: let go of the memory on the device."""
        if self._slots:
            self._copies.end()
            self._slots = []
            self._origins.clear()

    def _visitor(self, view: Tensor) -> Tensor:
        start, self._filled = self._filled, self._filled + staged_bytes([view.nbytes])
        visitor = self._slots[self._slot][start : start + view.nbytes].view(view.dtype)
        self._origins[visitor.data_ptr()] = view
        return visitor


def host_tensors(like: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """Return zeros in these shapes and dtypes in one pinned buffer, of exactly the size that they have together."""
    size = sum(tensor.nbytes for tensor in like.values())
    if not size:
        return {key: torch.zeros(tensor.shape, dtype=tensor.dtype) for key, tensor in like.items()}
    buffer, start, made = pinned.allocate(size), 0, {}
    for key in sorted(like, key=lambda key: -like[key].itemsize):  # so that each begins at a multiple of its numbers
        tensor = like[key]
        made[key] = buffer[start : start + tensor.nbytes].view(tensor.dtype).view(tensor.shape)
        start += tensor.nbytes
    return {key: made[key] for key in like}
