"""Flat pieces of tensors, the fp32 work buffers that every piece reuses, and the rounding noise."""

from __future__ import annotations

from functools import cache

import numpy as np
import torch
from torch import Tensor

from bigtrain.optim.cost import DITHER_WINDOWS, NOISE_ELEMENTS, block_count, buffer_elements

IRRATIONALS = {"weights": 0.6180339887498949, "first": 0.4142135623730951, "second": 0.7320508075688772}
"""Steps of the three Weyl sequences: quadratic irrationals, whose multiples spread most evenly."""

WINDOW_STRIDE = 1021
"""Windows between one piece and the next; prime, so that pieces meet all windows."""


Window = int | Tensor
Views = tuple[Tensor, ...]


def split(tensor: Tensor, elements: int) -> list[Tensor]:
    """Return a contiguous tensor's pieces of so many elements, flat; the last may be shorter."""
    flat = tensor.detach().view(-1)
    return list(torch.split(flat, elements)) if len(flat) else []


@cache
def shift(bits: int) -> Tensor:
    """Return a number of bits to shift by, as the tensor that torch would make and convert at each call."""
    return torch.tensor(bits, dtype=torch.int32)


class Workspace:
    """Buffers and noise tables of one device, made at first use and kept.

    The noise of element i at step t is frac((i + t) * irrational): a table is one Weyl sequence, and a step reads it
    one place further on; after NOISE_ELEMENTS elements it begins again. So an element's noise is a Weyl sequence in
    time, its sum over steps stays bounded, and it is a pure function of the step: resuming needs no generator state.
    """

    def __init__(self, device: torch.device, piece_elements: int) -> None:
        self.device = device
        self.elements = buffer_elements(piece_elements)
        self._buffers: dict[str, Tensor] = {}
        self._views: dict[tuple[str, int, int], Tensor] = {}
        self._tables: dict[tuple[str, int], Tensor] = {}

    def floats(self, name: str, elements: int) -> Tensor:
        """Return the first elements of the fp32 buffer of that name; it holds a piece, filled up to whole blocks."""
        return self._view(name, elements, 0)

    def integers(self, name: str, elements: int) -> Tensor:
        """Return the same memory as int32."""
        return self._view(name, elements, -1)

    def rows(self, name: str, elements: int, block: int) -> Tensor:
        """Return the same memory as fp32 blocks, one a row."""
        return self._view(name, elements, block)

    def noisy(self, name: str, elements: int, *, integers: bool = True) -> Tensor:
        """Return the first elements and those that fill up the last row, in rows to which noise is added."""
        whole = block_count(elements, NOISE_ELEMENTS) * NOISE_ELEMENTS
        return self._view(name, whole, -NOISE_ELEMENTS if integers else NOISE_ELEMENTS)

    def room(self, name: str, elements: int) -> Tensor:
        """Return an fp32 buffer of that name and a size of its own; it grows where it is too small."""
        if len(self._buffers.get(name, ())) < elements:
            self._buffers[name] = torch.empty(elements, dtype=torch.float32, device=self.device)
        return self._buffers[name]

    def _view(self, name: str, elements: int, kind: int) -> Tensor:
        # Kept, since making a view costs as much time as some thousand elements of arithmetic.
        if (name, elements, kind) not in self._views:
            if name not in self._buffers:
                self._buffers[name] = torch.empty(self.elements, dtype=torch.float32, device=self.device)
            flat = self._buffers[name][:elements]
            typed = flat.view(torch.int32) if kind < 0 else flat
            self._views[name, elements, kind] = typed.view(-1, abs(kind)) if abs(kind) > 1 else typed
        return self._views[name, elements, kind]

    def window(self, step: Tensor) -> Window:
        """Return the noise window of a step's first piece: a number on the CPU; on a GPU it stays there, unread."""
        return int(step.item()) if self.device.type == "cpu" else step.to(torch.int32)

    def noise(self, use: str, bits: int, window: Window) -> Tensor:
        """Return a window's noise, a row of `noisy`: int32 from 0 up to 2**bits, or fp32 from 0 to 1 for 0 bits."""
        table = self._table(use, bits)
        start = window % DITHER_WINDOWS
        if isinstance(start, int):
            return table[start : start + NOISE_ELEMENTS]
        places = torch.arange(NOISE_ELEMENTS, dtype=torch.int32, device=self.device) + start
        return table.index_select(0, places)

    def _table(self, use: str, bits: int) -> Tensor:
        if (use, bits) not in self._tables:
            factor = np.uint32(IRRATIONALS[use] * 2**32)
            sequence = np.arange(NOISE_ELEMENTS + DITHER_WINDOWS, dtype=np.uint32) * factor
            self._tables[use, bits] = self._scaled(sequence, bits)
        return self._tables[use, bits]

    def _scaled(self, sequence: np.ndarray[tuple[int], np.dtype[np.uint32]], bits: int) -> Tensor:
        dtype = torch.int32 if bits else torch.float32
        table = torch.empty(len(sequence), dtype=dtype, device=self.device)
        if bits == 0:
            scaled = ((sequence >> 19).astype(np.float32) + np.float32(0.5)) / np.float32(2**13)
        else:
            scaled = (sequence >> (32 - bits)).astype(np.int32)
        if bits > 16:
            # As above, never near 0 or the top: a value that but for fp32's own rounding lies on a level stays there.
            margin = 1 << (bits - 16)
            scaled = scaled.clip(margin, (1 << bits) - margin)
        return table.copy_(torch.from_numpy(scaled))
