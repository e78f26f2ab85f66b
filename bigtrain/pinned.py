"""Page-locked host buffers of exactly the size that is asked for, from which CUDA copies without a detour.

torch's own pinned memory rounds sizes up to powers of two (pytorch#150517): 130 MiB take 256. Here plain pages are
mapped and registered with CUDA. Where there is no CUDA the same buffers are plain memory.
"""

from __future__ import annotations

import mmap
import weakref
from bisect import bisect_left, insort
from typing import Any

import torch
from torch import Tensor

from bigtrain.errors import InputError
from bigtrain.units import format_bytes

PORTABLE = 1
"""cudaHostRegisterPortable: pinned for every CUDA context of the process."""


def allocate(size_bytes: int, *, registered: bool | None = None) -> Tensor:
    """Return a new host buffer: a flat uint8 tensor of exactly so many bytes, at the start of a page.

    It is registered with CUDA where that is available, or as `registered` says, and given back to the system when the
    last view of it dies. Raises InputError if the system refuses to pin it.
    """
    if size_bytes < 1:
        raise ValueError(f"a host buffer of {size_bytes} bytes")
    pages = mmap.mmap(-1, size_bytes)
    buffer = torch.frombuffer(pages, dtype=torch.uint8)
    if torch.cuda.is_available() if registered is None else registered:
        _register(buffer, pages)
    return buffer


def _register(buffer: Tensor, pages: mmap.mmap) -> None:
    address = buffer.data_ptr()
    error = int(_runtime().cudaHostRegister(address, buffer.nbytes, PORTABLE))
    if error:
        raise InputError(
            f"pinned memory: cudaHostRegister of {format_bytes(buffer.nbytes)} failed with CUDA error {error}; "
            "raise the limit of locked memory (`ulimit -l`), free host memory, or do without offload"
        )
    # Not at exit: the driver is gone by then, and the pages go with the process.
    weakref.finalize(buffer.untyped_storage(), _unregister, address, pages).atexit = False


def _unregister(address: int, pages: mmap.mmap) -> None:
    """Unpin pages; they are an argument so that they stay mapped until this has run.

    The host runs ahead of the device: a copy may still be under way, though nothing refers to the buffer any more.
    """
    torch.cuda.synchronize()
    _runtime().cudaHostUnregister(address)


def _runtime() -> Any:
    return torch.cuda.cudart()  # type: ignore[no-untyped-call]


class Pool:
    """Hand out host buffers and take them back, so that later steps pin nothing anew.

    A request is served by the smallest free buffer that is large enough. If none is, the largest free one makes room
    for a new one of the exact size: where sizes differ from step to step, each buffer grows to the largest that was
    asked of it, and there are never more than were out at once. A buffer that is given back may be handed out again
    at once: copies that still read or write it must be ordered before those of its next user, by one stream for all.
    """

    def __init__(self, *, registered: bool | None = None) -> None:
        self._registered = registered
        self._free: list[Tensor] = []
        self.held_bytes = 0
        """Bytes of all buffers, handed out or free."""

    def take(self, size_bytes: int) -> Tensor:
        """Return a buffer of at least so many bytes, a flat uint8 tensor; its contents are arbitrary.

        Raises InputError if a new one cannot be pinned.
        """
        place = bisect_left(self._free, size_bytes, key=_size)
        if place < len(self._free):
            return self._free.pop(place)
        if self._free:
            self.held_bytes -= self._free.pop().nbytes
        buffer = allocate(size_bytes, registered=self._registered)
        self.held_bytes += buffer.nbytes
        return buffer

    def give_back(self, buffer: Tensor) -> None:
        """Take back a buffer that `take` returned, for the next request."""
        insort(self._free, buffer, key=_size)


def _size(buffer: Tensor) -> int:
    return buffer.nbytes
