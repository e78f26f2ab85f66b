"""How tensors in one layout are made of those in the other, each when it is written."""

from __future__ import annotations

from collections.abc import Mapping
from functools import partial

import torch
from torch import Tensor

from bigtrain.checkpoint.stored import StoredTensors
from bigtrain.checkpoint.tensors import DTYPES, Outline
from bigtrain.config.model import ModelConfig
from bigtrain.errors import CheckpointError, Fault
from bigtrain.hugging_face.source import FileTensor
from bigtrain.models.hf import own_shapes
from bigtrain.models.hf_names import BERT_BIAS, BERT_DECODER_BIAS, Entry, tensor_entries
from bigtrain.sharding.part import Part

DIGITS = {torch.float64: 53, torch.float32: 24, torch.float16: 11, torch.bfloat16: 8}
"""What weights may be, and the bits of a number that tell two of them apart."""


def their_outlines(config: ModelConfig, stored: StoredTensors) -> dict[str, Outline]:
    """Return Hugging Face's tensors of a checkpoint; of joined ones only the rows that are wanted are read.

    The widest types come first, so that each tensor lies where its type wants it.
    """
    found: dict[str, Outline] = {}
    for entry in tensor_entries(config):
        dtype, whole, first = stored.entries[entry.name].dtype, stored.shape(entry.name), 0
        for name, shape in zip(entry.theirs, entry.shapes, strict=True):
            part = Part.of_rows(whole, [(first, shape[0])])
            rows = partial(stored.read, entry.name, part)
            found[name] = Outline(dtype, shape, partial(_transposed, stored, entry.name) if entry.transposed else rows)
            first += shape[0]
    if config.family == "bert" and not config.tie_word_embeddings:
        found[BERT_DECODER_BIAS] = found[BERT_BIAS]
    return dict(sorted(found.items(), key=lambda item: -item[1].dtype.itemsize))


def _transposed(stored: StoredTensors, name: str) -> Tensor:
    return stored.read(name, Part.of_whole(stored.shape(name))).T.contiguous()


def own_outlines(config: ModelConfig, theirs: Mapping[str, FileTensor]) -> dict[str, Outline]:
    """Return the tensors of a built model, its vocabulary padded with zeros.

    Raises CheckpointError for weights that are not floating-point, or of several types where they are joined.
    """
    shapes, found = own_shapes(config), {}
    for entry in tensor_entries(config):
        parts = [theirs[name] for name in entry.theirs]
        dtype = _common_dtype(entry, parts)
        found[entry.name] = Outline(dtype, shapes[entry.name], partial(_joined, entry, parts, shapes[entry.name]))
    return found


def _common_dtype(entry: Entry, parts: list[FileTensor]) -> torch.dtype:
    dtype = parts[0].dtype
    if dtype not in DIGITS:
        raise CheckpointError(Fault("", entry.theirs[0], f"of type {DTYPES[dtype]}; use F32, BF16 or F16"))
    other = next((name for name, part in zip(entry.theirs, parts, strict=True) if part.dtype != dtype), None)
    if other is not None:
        text = f"not of the type of {entry.theirs[0]}, {DTYPES[dtype]}, with which it is one tensor here; convert one"
        raise CheckpointError(Fault("", other, text))
    return dtype


def _joined(entry: Entry, parts: list[FileTensor], shape: tuple[int, ...]) -> Tensor:
    if entry.transposed:
        return parts[0].read().T.contiguous()
    tensor = torch.zeros(shape, dtype=parts[0].dtype)
    start = 0
    for part in parts:
        part.read_into(tensor, start)
        start += part.elements
    return tensor
