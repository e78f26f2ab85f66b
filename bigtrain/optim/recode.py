"""Optimizer moments out of the format in which they are kept, and into another one, to the nearest."""

from __future__ import annotations

import torch
from torch import Tensor

from bigtrain.optim.cost import NOISE_ELEMENTS
from bigtrain.optim.pieces import Window, Workspace, split
from bigtrain.optim.quantize import Codec, State

PIECE_ELEMENTS = 2**17


class _Nearest(Workspace):
    """A workspace whose noise is always one half: values halfway between two levels go up, others to the nearer."""

    def noise(self, use: str, bits: int, window: Window) -> Tensor:
        """Return half of what noise goes up to, a row of `noisy`."""
        dtype, half = (torch.int32, 1 << (bits - 1)) if bits else (torch.float32, 0.5)
        return torch.full((NOISE_ELEMENTS,), half, dtype=dtype)


def decode(codec: Codec, state: State, into: Tensor) -> None:
    """Read a moment from its state into a contiguous fp32 tensor of its shape, on the CPU."""
    work = _Nearest(into.device, PIECE_ELEMENTS)
    for views, part in zip(codec.split(state, PIECE_ELEMENTS), split(into, PIECE_ELEMENTS), strict=True):
        part.copy_(codec.load(views, len(part), work))


def encode(codec: Codec, values: Tensor) -> State:
    """Return the state of a moment whose values, contiguous and fp32 on the CPU, are these: to the nearest level."""
    state, work = codec.allocate(values), _Nearest(values.device, PIECE_ELEMENTS)
    for views, part in zip(codec.split(state, PIECE_ELEMENTS), split(values, PIECE_ELEMENTS), strict=True):
        codec.load(views, len(part), work).copy_(part)
        codec.store(views, len(part), work, 0)
    return state
