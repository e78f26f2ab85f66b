"""Names and layouts to and from Hugging Face: BERT with its masked and next-sentence heads, GPT-2, Llama."""

from __future__ import annotations

import re
from collections.abc import Callable, Iterator, Mapping
from itertools import islice
from typing import Any, Protocol, TypeVar

import torch
from torch import Tensor

from bigtrain.config.model import ModelConfig
from bigtrain.errors import CheckpointError, Fault
from bigtrain.models.hf_config import config_from_json, config_to_json
from bigtrain.models.hf_names import (
    BERT_BIAS,
    BERT_DECODER_BIAS,
    HEAD,
    NEXT_SENTENCE,
    NOT_WEIGHTS,
    PREFIX,
    TOKENS,
    Entry,
    tensor_entries,
)


class Shaped(Protocol):
    """A tensor, or what is known of one that is in a file."""

    @property
    def shape(self) -> tuple[int, ...]:
        """Return its sizes."""


Held = TypeVar("Held", bound=Shaped)


def to_hugging_face(config: ModelConfig, state: Mapping[str, Tensor]) -> tuple[dict[str, Any], dict[str, Tensor]]:
    """Return config.json and the tensors, from the `state_dict` of a built model.

    The vocabulary comes without its padding; tied heads are left out, as transformers itself does. Dropout and the ids
    of special tokens are not the model's to know, and stay out of config.json or null.
    Raises CheckpointError when the state is not that of the configuration's model.
    """
    entries = list(tensor_entries(config))
    refuse_differences(own_shapes(config), state)
    tensors: dict[str, Tensor] = {}
    for entry in entries:
        tensor = state[entry.name]
        tensor = tensor[: config.vocab_size] if entry.vocabulary else tensor
        parts = [tensor.T] if entry.transposed else tensor.split_with_sizes([shape[0] for shape in entry.shapes])
        tensors.update(zip(entry.theirs, (part.contiguous() for part in parts), strict=True))
    if config.family == "bert" and not config.tie_word_embeddings:
        tensors[BERT_DECODER_BIAS] = tensors[BERT_BIAS].clone()
    return config_to_json(config), tensors


def from_hugging_face(
    config_json: Mapping[str, Any], tensors: Mapping[str, Tensor]
) -> tuple[ModelConfig, dict[str, Tensor]]:
    """Return the shape and the `state_dict` of the model that a Hugging Face folder holds.

    Raises InputError for an architecture or a feature that is not supported, CheckpointError for tensors that are
    missing, superfluous or of another shape, with the first three. A head that is tied may be there or not; one that
    should be tied and differs from the embedding is refused.
    """
    config = config_from_json(config_json)
    theirs = modern_names(config, tensors)
    drop_copies(config, theirs, torch.equal)
    refuse_differences(their_shapes(config), theirs)
    return config, {entry.name: _join(config, entry, theirs) for entry in tensor_entries(config)}


def own_shapes(config: ModelConfig) -> dict[str, tuple[int, ...]]:
    """Return the shape of each tensor of a built model, its vocabulary padded."""
    return {entry.name: _own_shape(config, entry) for entry in tensor_entries(config)}


def their_shapes(config: ModelConfig) -> dict[str, tuple[int, ...]]:
    """Return the shape of each tensor of such a model in Hugging Face's layout."""
    entries = tensor_entries(config)
    return {name: shape for entry in entries for name, shape in zip(entry.theirs, entry.shapes, strict=True)}


def _join(config: ModelConfig, entry: Entry, theirs: Mapping[str, Tensor]) -> Tensor:
    parts = [theirs[name] for name in entry.theirs]
    tensor = parts[0] if len(parts) == 1 else torch.cat(parts)
    if entry.transposed:
        tensor = tensor.T
    if entry.vocabulary:
        padding = config.padded_vocab_size - config.vocab_size
        tensor = torch.cat((tensor, tensor.new_zeros(padding, *tensor.shape[1:])))
    return tensor.contiguous()


def _own_shape(config: ModelConfig, entry: Entry) -> tuple[int, ...]:
    first = entry.shapes[0]
    if entry.transposed:
        return first[::-1]
    rows = config.padded_vocab_size if entry.vocabulary else sum(shape[0] for shape in entry.shapes)
    return (rows, *first[1:])


def modern_names(config: ModelConfig, tensors: Mapping[str, Held]) -> dict[str, Held]:
    """Return the weights under today's names: with the prefix, and `weight` and `bias` for `gamma` and `beta`."""
    prefix = PREFIX[config.family]
    bare = not any(name.startswith(prefix) for name in tensors)
    renamed = {}
    for name, tensor in tensors.items():
        name = re.sub(r"LayerNorm\.gamma$", "LayerNorm.weight", re.sub(r"LayerNorm\.beta$", "LayerNorm.bias", name))
        if bare and not name.startswith(("cls.", "lm_head.")):
            name = prefix + name
        if not NOT_WEIGHTS.fullmatch(name) or (config.next_sentence and NEXT_SENTENCE.fullmatch(name)):
            renamed[name] = tensor
    return renamed


def drop_copies(config: ModelConfig, theirs: dict[str, Held], equal: Callable[[Held, Held], bool]) -> None:
    """Leave one of each pair of tensors that stand for the same weight; `equal` tells whether two are the same.

    One that stands alone takes the name of the weight. Raises CheckpointError where they are not. Untied, transformers
    reads the bias of BERT's decoder and leaves the other unused.
    """
    if config.family == "bert" and not config.tie_word_embeddings and BERT_DECODER_BIAS in theirs:
        theirs[BERT_BIAS] = theirs.pop(BERT_DECODER_BIAS)
    if config.tie_word_embeddings:
        _drop_equal(theirs, BERT_DECODER_BIAS, BERT_BIAS, equal)
        _drop_equal(theirs, HEAD[config.family], TOKENS[config.family], equal)


def _drop_equal(theirs: dict[str, Held], copy: str, original: str, equal: Callable[[Held, Held], bool]) -> None:
    if copy not in theirs:
        return
    if original not in theirs:
        theirs[original] = theirs.pop(copy)
        return
    if not equal(theirs[copy], theirs[original]):
        text = f"differs from {original}, to which config.json ties it; set tie_word_embeddings to false there"
        raise CheckpointError(Fault("", copy, text))
    del theirs[copy]


def refuse_differences(expected: Mapping[str, tuple[int, ...]], found: Mapping[str, Held]) -> None:
    """Raise CheckpointError with the first three tensors that are missing, superfluous or of another shape."""
    faults = list(islice(_differences(expected, found), 3))
    if faults:
        raise CheckpointError(*faults)


def _differences(expected: Mapping[str, tuple[int, ...]], found: Mapping[str, Held]) -> Iterator[Fault]:
    for name, shape in expected.items():
        if name not in found:
            yield Fault("", name, f"missing; a tensor of shape {list(shape)} should be there")
        elif tuple(found[name].shape) != shape:
            yield Fault("", name, f"has shape {list(found[name].shape)}; the configuration says {list(shape)}")
    for name in found:
        if name not in expected:
            yield Fault("", name, "not a tensor of this model; the configuration describes another one")
