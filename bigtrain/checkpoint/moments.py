"""Optimizer states of a checkpoint as a rank needs them, whatever ranks have written them.

A moment of 8 or 4 bits is kept in blocks of a rank's own elements. Where its blocks begin where stored ones do, which
they do if a row is a multiple of a block, they are taken over bit by bit; elsewhere the numbers are rounded anew.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import Literal, NamedTuple

import torch
from torch import Tensor
from torch.optim import Optimizer

from bigtrain.checkpoint import tensors
from bigtrain.checkpoint.boxes import Run
from bigtrain.checkpoint.stored import Source, StoredTensors
from bigtrain.errors import CheckpointError
from bigtrain.optim.cost import block_count
from bigtrain.optim.piecewise import Piecewise
from bigtrain.optim.quantize import Blocks, Codec, Plain, State, codec_for
from bigtrain.optim.recode import decode, encode
from bigtrain.sharding.part import Part, Shape

SCALE = "_scale"

Kind = Literal["moment", "scale", "row", "whole", "cut"]
"""Of a state: in the optimizer's format; scales of one that is; a number a row; the same on all ranks; cut likewise."""


def kind_of(optimizer: Optimizer, parameter: Tensor, key: str, shape: Shape, like: Shape) -> Kind:
    """Return how a state of a parameter is spread over ranks; `shape` is the state's where the parameter's is `like`.

    Raises CheckpointError for a state of which this cannot be known.
    """
    if isinstance(optimizer, Piecewise):
        moments = optimizer.moments(parameter)
        if key in moments:
            return "moment"
        if key.removesuffix(SCALE) in moments:
            return "scale"
        if key in optimizer.row_keys:
            return "row"
        if key in optimizer.whole_keys:
            return "whole"
    if not shape:
        return "whole"
    if shape == like:
        return "cut"
    raise CheckpointError(
        f"{type(optimizer).__name__}: its state {key!r} of shape {shape}, of a parameter of {like}, cannot be spread "
        "over ranks; use an optimizer of bigtrain.optim"
    )


def part_of(kind: Kind, part: Part) -> Part | None:
    """Return the part of a state that belongs to a part of a parameter; None of one that is not in parts."""
    if kind == "row":
        return Part(part.whole[:1], part.start[:1], part.shape[:1], part.rows)
    return part if kind in ("moment", "cut") else None


class Moment(NamedTuple):
    """A moment of a parameter in a checkpoint: its name there, what it is used for, the format it was stored in."""

    name: str
    key: str
    use: str
    stored_format: str

    def codec(self, elements: int, state_format: str | None = None) -> Codec:
        """Return the codec of so many elements that a rank has, in the stored format or another."""
        return codec_for(self.key, self.use, state_format or self.stored_format, elements)


def read_moment(stored: StoredTensors, moment: Moment, part: Part, state_format: str) -> tuple[State, bool]:
    """Return the state of a part of a moment in a format, and whether numbers were rounded anew for it."""
    codec = moment.codec(math.prod(part.shape), state_format)
    sources = stored.sources(moment.name, part)
    if isinstance(codec, Blocks) and _blocks_alike(codec, moment, sources):
        return _copied(codec, moment, sources, part), False
    values = torch.empty(part.shape, dtype=torch.float32)
    for source in sources:
        _decode(moment, source, values)
    state = {moment.key: values} if type(codec) is Plain else encode(codec, values)
    return state, isinstance(codec, Blocks)


def _blocks_alike(codec: Blocks, moment: Moment, sources: Sequence[Source]) -> bool:
    """Tell whether each block that is wanted is one that is stored, or its beginning."""
    kept = [moment.codec(math.prod(source.part.shape)) for source in sources]
    places = [place for source in sources for run in source.runs for place in (run.source, run.target)]
    same = all(isinstance(other, Blocks) and other.bits == codec.bits for other in kept)
    return same and all(place % codec.block == 0 for place in places)


def _copied(codec: Blocks, moment: Moment, sources: Sequence[Source], part: Part) -> State:
    state = codec.allocate(torch.empty(part.shape, dtype=torch.float32))
    for source in sources:
        codes, scales = (source.entries[moment.name + end] for end in ("", SCALE))
        stored = math.prod(source.part.shape)
        code_runs = [_code_run(codec, run, stored) for run in source.runs]
        tensors.read_runs(source.path, codes, code_runs, state[codec.key])
        scale_runs = [
            Run(run.source // codec.block, run.target // codec.block, block_count(run.length, codec.block))
            for run in source.runs
        ]
        tensors.read_runs(source.path, scales, scale_runs, state[codec.scale_key])
    return state


def _code_run(codec: Blocks, run: Run, elements: int) -> Run:
    """Return a run of elements, from the beginning of a block, as one of code numbers; packed ones are whole blocks."""
    if codec.bits == 8:
        return run
    length = block_count(run.length, codec.block) * codec.block
    return Run(*(number * codec.bits // 8 for number in (run.source, run.target, length)))


def _decode(moment: Moment, source: Source, into: Tensor) -> None:
    """Put what a file has of a moment into fp32 numbers."""
    elements = math.prod(source.part.shape)
    codec, entry = moment.codec(elements), source.entries[moment.name]
    flat = into.view(-1)
    if not isinstance(codec, Blocks):
        if entry.dtype == into.dtype:
            tensors.read_runs(source.path, entry, source.runs, into)
            return
        for run in source.runs:
            numbers = torch.empty(run.length, dtype=entry.dtype)
            tensors.read_runs(source.path, entry, [Run(run.source, 0, run.length)], numbers)
            flat[run.target : run.target + run.length] = numbers
        return
    for run in source.runs:
        skipped = run.source % codec.block
        covering = Run(run.source - skipped, 0, run.length + skipped)
        one = Source(source.path, source.entries, source.part, (covering,))
        values = torch.empty(covering.length, dtype=torch.float32)
        decode(codec, _copied(codec, moment, [one], Part.of_whole((covering.length,))), values)
        flat[run.target : run.target + run.length] = values[skipped:]
