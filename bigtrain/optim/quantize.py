"""Optimizer moments in fewer bits: bf16, 8 bits, 4 bits. Each codec reads and writes flat pieces as fp32.

Every rounding is to one of the two neighbouring levels, up when the noise of `pieces.Workspace` says so, with the
probability that keeps the *value* unbiased, not its code: moving averages that change by less than a level a step still
move, and their mean does not drift.

Codecs do not look for values that are not finite: the caller has left such gradients out.
"""

from __future__ import annotations

from typing import Protocol

import torch
from torch import Tensor

from bigtrain.optim.cost import BLOCK_ELEMENTS, LEAST_QUANTIZED_ELEMENTS, block_count
from bigtrain.optim.pieces import Views, Window, Workspace, shift, split

LEAST_SCALE = 2.0**-120
"""Blocks below this size fade to zero: its reciprocal is still an fp32 number."""

State = dict[str, Tensor]


class Codec(Protocol):
    """How one moment of a parameter is kept in its optimizer state, under `key`."""

    key: str

    def allocate(self, parameter: Tensor) -> State:
        """Return the tensors of a moment that is all zero, by their keys in the state."""

    def split(self, state: State, elements: int) -> list[Views]:
        """Return, for each piece of so many elements, views of all that `store` writes."""

    def load(self, views: Views, count: int, work: Workspace) -> Tensor:
        """Return a piece of `count` elements as fp32, to be changed in place: the state itself, or a work buffer."""

    def store(self, views: Views, count: int, work: Workspace, window: Window) -> None:
        """Write back the piece that was loaded last, rounded by the noise of a window."""


def codec_for(key: str, use: str, state: str, elements: int) -> Codec:
    """Return the codec of a moment; `use` is `first` (signed) or `second` (not negative).

    A tensor of fewer than LEAST_QUANTIZED_ELEMENTS keeps fp32 where others have 8 or 4 bits.
    """
    if state == "fp32" or (state in BLOCK_ELEMENTS and elements < LEAST_QUANTIZED_ELEMENTS):
        return Plain(key)
    if state == "bf16":
        return Rounded(key, use)
    return Squares(key, state) if use == "first" else Binades(key, state)


class Plain:
    """Fp32, changed where it is."""

    def __init__(self, key: str) -> None:
        self.key = key

    def allocate(self, parameter: Tensor) -> State:
        """Return zeros like the parameter, in fp32."""
        return {self.key: torch.zeros_like(parameter, dtype=torch.float32)}

    def split(self, state: State, elements: int) -> list[Views]:
        """Return the pieces of the state."""
        return [(part,) for part in split(state[self.key], elements)]

    def load(self, views: Views, count: int, work: Workspace) -> Tensor:
        """Return the piece of the state."""
        return views[0]

    def store(self, views: Views, count: int, work: Workspace, window: Window) -> None:
        """Do nothing: the state was changed in place."""


class Rounded(Plain):
    """Bf16: the upper half of an fp32 number, the lower rounded away."""

    def __init__(self, key: str, use: str) -> None:
        super().__init__(key)
        self.use = use

    def allocate(self, parameter: Tensor) -> State:
        """Return zeros like the parameter, in bf16."""
        return {self.key: torch.zeros_like(parameter, dtype=torch.bfloat16)}

    def load(self, views: Views, count: int, work: Workspace) -> Tensor:
        """Return the piece in the work buffer."""
        return work.floats(self.use, count).copy_(views[0])

    def store(self, views: Views, count: int, work: Workspace, window: Window) -> None:
        """Round the work buffer into the state."""
        work.noisy(self.use, count).add_(work.noise(self.use, 16, window))
        bits = work.integers(self.use, count).bitwise_right_shift_(shift(16))
        views[0].view(torch.int16).copy_(bits)


class Blocks:
    """Codes in blocks, each with an fp32 scale: the largest magnitude in the block over that of the largest code.

    8 bits: codes in the parameter's shape. 4 bits: flat, filled up to whole blocks; the lower halves of a block's bytes
    are its first half. A block of zeros has scale 0 and comes back as zeros.
    """

    use: str
    code_dtype: torch.dtype

    def __init__(self, key: str, state: str) -> None:
        self.key, self.scale_key = key, f"{key}_scale"
        self.bits = {"8bit": 8, "4bit": 4}[state]
        self.block = BLOCK_ELEMENTS[state]

    def allocate(self, parameter: Tensor) -> State:
        """Return zero codes and zero scales."""
        blocks = block_count(parameter.numel(), self.block)
        if self.bits == 8:
            codes = torch.zeros_like(parameter, dtype=self.code_dtype)
        else:
            codes = torch.zeros(blocks * self.block // 2, dtype=torch.uint8, device=parameter.device)
        return {self.key: codes, self.scale_key: torch.zeros(blocks, dtype=torch.float32, device=parameter.device)}

    def split(self, state: State, elements: int) -> list[Views]:
        """Return the codes and the scales of each piece, whose size is a multiple of the block's."""
        codes = split(state[self.key], elements * self.bits // 8)
        return list(zip(codes, split(state[self.scale_key], block_count(elements, self.block)), strict=True))

    def _multiply(self, scales: Tensor, work: Workspace) -> None:
        """Multiply each block of the work buffer by its scale."""
        work.rows(self.use, len(scales) * self.block, self.block).mul_(scales.unsqueeze(1))

    def _divide(self, buffer: str, scales: Tensor, work: Workspace, top: float) -> None:
        """Scale each block of a buffer so that its largest element becomes `top`; write down the scales."""
        rows = work.rows(buffer, len(scales) * self.block, self.block)
        torch.amax(rows, 1, out=scales).mul_(1 / top)
        factors = torch.clamp(scales, min=LEAST_SCALE, out=work.floats("factors", len(scales)))
        rows.mul_(factors.reciprocal_().unsqueeze(1))

    def _clear_rest(self, count: int, total: int, work: Workspace) -> None:
        if count < total:
            work.floats(self.use, total)[count:].zero_()

    def _pack(self, codes: Tensor, into: Tensor) -> None:
        """Write the lower four bits of int32 codes, two to a byte."""
        halves = codes.view(-1, 2, self.block // 2)
        first, second = halves[:, 0].bitwise_and_(15), halves[:, 1].bitwise_left_shift_(shift(4))
        into.view(-1, self.block // 2).copy_(first.bitwise_or_(second))

    def _unpack(self, packed: Tensor, into: Tensor) -> None:
        """Read codes from 0 to 15 into an int32 buffer."""
        halves = into.view(-1, 2, self.block // 2)
        halves.copy_(packed.view(-1, 1, self.block // 2).expand_as(halves))
        halves[:, 0].bitwise_and_(15)
        halves[:, 1].bitwise_right_shift_(shift(4))


class Squares(Blocks):
    """First moments: the value is sign(code) * code**2 * scale, with 127 or 7 levels on each side of 0."""

    use = "first"
    code_dtype = torch.int8

    def __init__(self, key: str, state: str) -> None:
        super().__init__(key, state)
        self.levels = 2 ** (self.bits - 1) - 1

    def load(self, views: Views, count: int, work: Workspace) -> Tensor:
        """Return the piece in the work buffer."""
        codes, scales = views
        total = len(scales) * self.block
        values = work.floats("first", total)
        if self.bits == 8:
            work.floats("first", count).copy_(codes)
            self._clear_rest(count, total, work)
        else:
            signed = work.integers("spare", total)
            self._unpack(codes, signed)
            values.copy_(signed.bitwise_left_shift_(shift(28)).bitwise_right_shift_(shift(28)))
        values.mul_(torch.abs(values, out=work.floats("spare", total)))
        self._multiply(scales, work)
        return work.floats("first", count)

    def store(self, views: Views, count: int, work: Workspace, window: Window) -> None:
        """Round the work buffer into codes.

        With t = value / scale and n = floor(sqrt(t)), the level above n is taken when t + (2n + 1) * noise
        reaches (n + 1)**2: with probability (t - n**2) / (2n + 1).
        """
        codes, scales = views
        total = len(scales) * self.block
        values, squares, roots = (work.floats(name, total) for name in ("first", "spare", "other_spare"))
        self._clear_rest(count, total, work)
        torch.abs(values, out=squares)
        self._divide("spare", scales, work, self.levels**2)
        torch.sqrt(squares, out=roots).floor_()
        noise = work.noise("first", 0, window)
        noisy, levels = (work.noisy(name, total, integers=False) for name in ("spare", "other_spare"))
        noisy.addcmul_(levels, noise, value=2).add_(noise)
        squares.sqrt_().copysign_(values)
        if self.bits == 8:
            codes.copy_(work.floats("spare", count))
        else:
            self._pack(work.integers("other_spare", total).copy_(squares), codes)


class Binades(Blocks):
    """Second moments: small floating-point numbers without a sign, relative to the block's scale.

    8 bits: 5 of exponent, 3 of mantissa, so a range of 2.5e-10 and levels 6% to 12% apart throughout. 4 bits: powers of
    two down to 3e-5. There is no zero: a smaller value is kept as the lowest level, so m / sqrt(v) cannot blow up, and
    only a block of zeros is zero. Codes are the upper bits of fp32, so levels are evenly spaced between powers of two
    and adding noise below them rounds without bias.
    """

    use = "second"
    code_dtype = torch.uint8

    def __init__(self, key: str, state: str) -> None:
        super().__init__(key, state)
        mantissa_bits = {8: 3, 4: 0}[self.bits]
        self.shift = 23 - mantissa_bits
        # The exponents end at that of 1, whose field is 127: the bits above a code are the same for all of them.
        self.base = (128 << 23) - (1 << (self.shift + self.bits))
        self.lowest = 2.0 ** ((self.base >> 23) - 127)
        self.top = 2.0 - 2.0**-mantissa_bits

    def load(self, views: Views, count: int, work: Workspace) -> Tensor:
        """Return the piece in the work buffer."""
        codes, scales = views
        total = len(scales) * self.block
        fields = work.integers("second", total)
        if self.bits == 8:
            work.integers("second", count).copy_(codes)
            self._clear_rest(count, total, work)
        else:
            self._unpack(codes, fields)
        fields.bitwise_left_shift_(shift(self.shift)).add_(self.base)
        self._multiply(scales, work)
        return work.floats("second", count)

    def store(self, views: Views, count: int, work: Workspace, window: Window) -> None:
        """Round the work buffer into codes."""
        codes, scales = views
        total = len(scales) * self.block
        self._clear_rest(count, total, work)
        self._divide("second", scales, work, self.top)
        work.floats("second", total).clamp_(min=self.lowest)
        work.noisy("second", total).add_(work.noise("second", self.shift, window))
        fields = work.integers("second", total).bitwise_right_shift_(shift(self.shift))
        if self.bits == 8:
            codes.copy_(work.integers("second", count))
        else:
            self._pack(fields, codes)
