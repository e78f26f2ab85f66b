"""A copy of a rank's state in host memory, of exactly its size, to write from while training goes on."""

from __future__ import annotations

from collections.abc import Mapping

import torch
from torch import Tensor

from bigtrain.pinned import allocate

ALIGNMENT = 8
"""Bytes: a tensor begins where numbers of any dtype may."""

TensorFiles = Mapping[str, Mapping[str, Tensor]]


class Snapshot:
    """One host buffer, kept from save to save: making one of pinned memory takes longer than filling it.

    `registered` as for `pinned.allocate`.
    """

    def __init__(self, *, registered: bool | None = None) -> None:
        self._registered = registered
        self._buffer: Tensor | None = None

    @property
    def held_bytes(self) -> int:
        """Return what the buffer takes: the state of this rank, to 7 bytes a tensor."""
        return 0 if self._buffer is None else self._buffer.nbytes

    def take(self, files: TensorFiles) -> dict[str, dict[str, Tensor]]:
        """Copy the tensors of files by name, all at once, and return the copies, which the next call overwrites.

        Nothing is allocated on the device for tensors that are contiguous. Raises InputError where the host refuses
        the buffer.
        """
        needed = sum(_aligned(tensor.nbytes) for content in files.values() for tensor in content.values())
        if needed != self.held_bytes:
            self._buffer = None  # before the new one is there
            self._buffer = allocate(needed, registered=self._registered) if needed else None
        offset = 0
        copies: dict[str, dict[str, Tensor]] = {}
        for file, content in files.items():
            copies[file] = {}
            for name, tensor in content.items():
                copies[file][name] = self._copied(tensor, offset)
                offset += _aligned(tensor.nbytes)
        if any(tensor.is_cuda for content in files.values() for tensor in content.values()):
            torch.cuda.synchronize()
        return copies

    def _copied(self, tensor: Tensor, offset: int) -> Tensor:
        if not tensor.nbytes or self._buffer is None:
            return torch.empty(tensor.shape, dtype=tensor.dtype)
        place = self._buffer[offset : offset + tensor.nbytes].view(tensor.dtype).view(tensor.shape)
        return place.copy_(tensor.detach(), non_blocking=True)


def _aligned(size: int) -> int:
    return -(-size // ALIGNMENT) * ALIGNMENT
