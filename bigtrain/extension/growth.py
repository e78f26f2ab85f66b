"""The tensors of a checkpoint with more rows for a vocabulary; all that was there stays bit for bit.

A row of a new token is the mean of the rows of all tokens before. Its logit is then the mean of theirs, so that the
softmax gives it no more than it gives a token of before on average (Hewitt 2021, "Initializing New Word Embeddings for
Pretrained Language Models"): the loss of a text in the old tokens rises by at most log(1 + added / before). Optimizer
states of new rows are zero, but for Adafactor's mean squares, which are the mean of the others': they have no first
moment that starts from zero too, so the first updates of new rows would be some ten times too long, and the clip of the
whole matrix's update would shorten all others.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
import torch
from torch import Tensor, nn

from bigtrain.checkpoint.moments import Moment, kind_of, read_moment
from bigtrain.checkpoint.stored import StoredTensors
from bigtrain.checkpoint.tensors import TensorEntry, read_header
from bigtrain.config.model import VOCABULARY_MULTIPLE, ModelConfig
from bigtrain.config.schema import Recipe
from bigtrain.models.shape import parameter_shapes
from bigtrain.optim.build import build_optimizer
from bigtrain.optim.piecewise import Piecewise
from bigtrain.optim.quantize import Blocks, State
from bigtrain.optim.recode import encode
from bigtrain.optim.weights import weight_format
from bigtrain.sharding.part import Part, Shape
from bigtrain.sharding.rows import rows_of

MEAN_SQUARES = ("row", "variance")
"""Adafactor's states with a number for each token."""


@dataclass(frozen=True)
class Growth:
    """A model whose vocabulary grows to `tokens`; `shape` is the model's before."""

    shape: ModelConfig
    tokens: int

    @property
    def wholes(self) -> dict[str, tuple[Shape, Shape]]:
        """Return the shapes before and after of each parameter that has a row for each token, by name."""
        before = parameter_shapes(self.shape)
        after = parameter_shapes(replace(self.shape, vocab_size=self.tokens))
        more = parameter_shapes(replace(self.shape, vocab_size=self.tokens + VOCABULARY_MULTIPLE))
        return {name: (before[name], after[name]) for name in before if after[name] != more[name]}

    def fill(self, tensor: Tensor, first: int, row: Tensor) -> None:
        """Put a row at each new token of a tensor, whose rows are those of the whole from `first`."""
        begin, end = (max(0, token - first) for token in (self.shape.vocab_size, self.tokens))
        tensor[begin:end] = row


class Place(NamedTuple):
    """A tensor in a file of a checkpoint, which is mapped to `memory`; `holders` are all files that have some of it."""

    stored: StoredTensors
    file: Path
    name: str
    entry: TensorEntry
    memory: Any
    holders: list[Path]


class Grown:
    """The tensors of a checkpoint as they are to be written: by file, and which of them are parts.

    Those that do not grow are mapped, and read where they are written. `rounded` counts moments in few bits whose
    blocks fell otherwise.
    """

    def __init__(self, growth: Growth) -> None:
        self.tensors: dict[str, dict[str, Tensor]] = {}
        self.parts: dict[str, dict[str, Part]] = {}
        self.rounded = 0
        self._growth, self._wholes = growth, growth.wholes

    def add_weights(self, stored: StoredTensors) -> None:
        """Take the weights, with rows for the new tokens."""
        means: dict[str, Tensor] = {}
        for place in _places(stored):
            name = place.name
            if name not in self._wholes:
                self._keep(place)
                continue
            before, after = self._wholes[name]
            if name not in means:
                means[name] = self._mean(place, before)
            self._add_rows(place, before, after, means[name])

    def add_states(self, stored: StoredTensors, recipe: Recipe, state_format: str) -> None:
        """Take the states of a recipe's optimizer, with rows for the new tokens; moments are in that format."""
        optimizer, parameters = _optimizer_of(self._growth.shape, recipe)
        for place in _places(stored):
            name, _, key = place.name.rpartition(".")
            if name not in self._wholes:
                self._keep(place)
                continue
            before, after = self._wholes[name]
            shape = tuple(place.entry.shape) if place.entry.part is None else place.entry.part.whole
            kind = kind_of(optimizer, parameters[name], key, shape, before)
            if kind == "whole":
                self._keep(place)
            elif kind == "moment":
                use = optimizer.moments(parameters[name])[key]
                self._add_moment(place, Moment(place.name, key, use, state_format), before, after)
            elif kind != "scale":  # which is made with its moment
                before, after = (before[:1], after[:1]) if kind == "row" else (before, after)
                self._add_rows(place, before, after, self._mean(place, before) if key in MEAN_SQUARES else None)

    def _keep(self, place: Place) -> None:
        """Take a tensor over as it is."""
        entry = place.entry
        flat = torch.from_numpy(place.memory[entry.start : entry.start + entry.size])
        self._put(place.file, place.name, flat.view(entry.dtype).view(entry.shape))
        if entry.part is not None:
            self.parts.setdefault(place.file.name, {})[place.name] = entry.part

    def _put(self, file: Path, name: str, tensor: Tensor) -> None:
        self.tensors.setdefault(file.name, {})[name] = tensor

    def _put_part(self, place: Place, part: Part) -> None:
        if len(place.stored.files) > 1:
            self.parts.setdefault(place.file.name, {})[place.name] = part

    def _add_rows(self, place: Place, before: Shape, after: Shape, new: Tensor | None) -> None:
        """Take a file's rows of a tensor; those of new tokens are `new`, or zero."""
        part, section = _cut(place, before, after)
        tensor = _longer(place.stored.read(place.name, section), part.shape)
        if new is not None:
            self._growth.fill(tensor, part.start[0], new)
        self._put(place.file, place.name, tensor)
        self._put_part(place, part)

    def _add_moment(self, place: Place, moment: Moment, before: Shape, after: Shape) -> None:
        part, section = _cut(place, before, after)
        state, rounded = _grown_moment(place.stored, moment, section, part)
        self.rounded += rounded
        for key, tensor in state.items():
            self._put(place.file, place.name.removesuffix(moment.key) + key, tensor)
        self._put_part(place, part)

    def _mean(self, place: Place, shape: Shape) -> Tensor:
        """Return the mean of the rows of the tokens before, in the tensor's dtype."""
        rows = place.stored.read(place.name, Part.of_whole(shape).narrow(0, self._growth.shape.vocab_size))
        return rows.mean(0, dtype=torch.float64).to(rows.dtype)


def _places(stored: StoredTensors) -> Iterator[Place]:
    """Yield where each tensor is."""
    headers = {path: read_header(path) for path in stored.files}
    holders: dict[str, list[Path]] = {}
    for path, entries in headers.items():
        for name in entries:
            holders.setdefault(name, []).append(path)
    for path, entries in headers.items():
        memory = np.memmap(path, np.uint8, "c")
        for name, entry in entries.items():
            yield Place(stored, path, name, entry, memory, holders[name])


def _cut(place: Place, before: Shape, after: Shape) -> tuple[Part, Part]:
    """Return a file's part of a tensor that has grown, and which of the tensor before that is.

    The files that have some of a tensor share its rows as ranks do.
    """
    part = rows_of(after, place.holders.index(place.file), len(place.holders))
    first = min(part.start[0], before[0])
    rows = min(part.shape[0], before[0] - first)
    return part, Part(before, (first, *part.start[1:]), (rows, *before[1:]))


def _longer(tensor: Tensor, shape: Shape) -> Tensor:
    """Return a tensor with rows of zeros behind it."""
    longer = tensor.new_zeros(shape)
    longer[: len(tensor)] = tensor
    return longer


def _grown_moment(stored: StoredTensors, moment: Moment, section: Part, part: Part) -> tuple[State, bool]:
    """Return the state of a part of a moment of which a section was there, and whether numbers were rounded anew.

    Codes and scales follow the order of the rows, so that zeros behind them are the rows that come.
    """
    like = torch.empty(part.shape)
    codec = moment.codec(like.numel())
    longer = codec.allocate(like)
    if not section.shape[0]:
        return longer, False
    state, rounded = read_moment(stored, moment, section, moment.stored_format)
    if isinstance(codec, Blocks) and codec.scale_key not in state:  # before, it was too small for few bits
        return encode(codec, _longer(state[moment.key], part.shape)), True
    for key, tensor in state.items():
        longer[key].view(-1)[: tensor.numel()] = tensor.view(-1)
    return longer, rounded


def _optimizer_of(shape: ModelConfig, recipe: Recipe) -> tuple[Piecewise, dict[str, nn.Parameter]]:
    """Return a recipe's optimizer over parameters without numbers, which knows what its states are, and these."""
    kept = recipe.amp.master_weights
    dtype = weight_format(kept).dtype
    parameters = {
        name: nn.Parameter(torch.empty(size, dtype=dtype, device="meta"))
        for name, size in parameter_shapes(shape).items()
    }
    matrices = [parameter for name, parameter in parameters.items() if name.startswith("blocks.")]
    made = build_optimizer(parameters.values(), recipe.optimizer, master_weights=kept, matrices=matrices)
    assert isinstance(made, Piecewise)
    return made, parameters
