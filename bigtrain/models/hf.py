"""Names and layouts to and from Hugging Face: BertForMaskedLM, GPT2LMHeadModel, LlamaForCausalLM."""

from __future__ import annotations

import re
from collections.abc import Iterator, Mapping
from itertools import islice
from typing import Any, NamedTuple

import torch
from torch import Tensor

from bigtrain.config.model import ModelConfig
from bigtrain.errors import CheckpointError, Fault, InputError
from bigtrain.models.hf_config import config_from_json, config_to_json
from bigtrain.models.shape import SEGMENTS

PREFIX = {"bert": "bert.", "gpt": "transformer.", "llama": "model."}
"""What names the model without its head; a checkpoint of that model alone leaves it out."""

NOT_WEIGHTS = re.compile(
    r".*(\.attn\.(masked_)?bias|embeddings\.position_ids|rotary_emb\.inv_freq)"
    r"|bert\.pooler\..*|cls\.seq_relationship\..*"
)
"""Constant buffers of older versions, and parts that the masked-language and causal models do not have."""


class Entry(NamedTuple):
    """One of our tensors: its name, the names there whose rows it joins, the shape of each there."""

    name: str
    theirs: tuple[str, ...]
    shapes: tuple[tuple[int, ...], ...]
    transposed: bool = False
    vocabulary: bool = False


def to_hugging_face(config: ModelConfig, state: Mapping[str, Tensor]) -> tuple[dict[str, Any], dict[str, Tensor]]:
    """Return config.json and the tensors, from the `state_dict` of a built model.

    The vocabulary comes without its padding; tied heads are left out, as transformers itself does. Dropout and the ids
    of special tokens are not the model's to know, and stay out of config.json or null.
    Raises CheckpointError when the state is not that of the configuration's model.
    """
    entries = list(_entries(config))
    _refuse_differences({entry.name: _own_shape(config, entry) for entry in entries}, state)
    tensors = {}
    for entry in entries:
        tensor = state[entry.name]
        tensor = tensor[: config.vocab_size] if entry.vocabulary else tensor
        parts = [tensor.T] if entry.transposed else tensor.split([shape[0] for shape in entry.shapes])
        tensors.update(zip(entry.theirs, (part.contiguous() for part in parts), strict=True))
    return config_to_json(config), tensors


def from_hugging_face(config_json: Mapping[str, Any], tensors: Mapping[str, Tensor]) -> tuple[ModelConfig, dict[str, Tensor]]:
    """Return the shape and the `state_dict` of the model that a Hugging Face folder holds.

    Raises InputError for an architecture or a feature that is not supported, CheckpointError for tensors that are
    missing, superfluous or of another shape, with the first three. A head that is tied may be there or not; one that
    should be tied and differs from the embedding is refused.
    """
    config = config_from_json(config_json)
    theirs = _modern_names(config, tensors)
    _drop_tied_copies(config, theirs)
    entries = list(_entries(config))
    _refuse_differences({name: shape for entry in entries for name, shape in zip(entry.theirs, entry.shapes, strict=True)}, theirs)
    return config, {entry.name: _join(config, entry, theirs) for entry in entries}


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


def _modern_names(config: ModelConfig, tensors: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """Return the weights under today's names: with the prefix, and `weight` and `bias` for `gamma` and `beta`."""
    prefix = PREFIX[config.family]
    bare = not any(name.startswith(prefix) for name in tensors)
    renamed = {}
    for name, tensor in tensors.items():
        name = re.sub(r"LayerNorm\.gamma$", "LayerNorm.weight", re.sub(r"LayerNorm\.beta$", "LayerNorm.bias", name))
        if bare and not name.startswith(("cls.", "lm_head.")):
            name = prefix + name
        if not NOT_WEIGHTS.fullmatch(name):
            renamed[name] = tensor
    return renamed


def _drop_tied_copies(config: ModelConfig, theirs: dict[str, Tensor]) -> None:
    """Remove the tensors that repeat another one."""
    copies = {}
    if config.family == "bert":
        copies["cls.predictions.decoder.bias"] = "cls.predictions.bias"
    if config.tie_word_embeddings:
        copies[_HEAD[config.family]] = _TOKENS[config.family]
    for copy, original in copies.items():
        if copy not in theirs:
            continue
        if original not in theirs or not torch.equal(theirs[copy], theirs[original]):
            text = f"differs from {original}, to which config.json ties it; set tie_word_embeddings to false there"
            raise CheckpointError(Fault("", copy, text))
        del theirs[copy]


def _refuse_differences(expected: Mapping[str, tuple[int, ...]], found: Mapping[str, Tensor]) -> None:
    """Raise CheckpointError with the first three tensors that are missing, superfluous or of another shape."""
    faults = list(islice(_differences(expected, found), 3))
    if faults:
        raise CheckpointError(*faults)


def _differences(expected: Mapping[str, tuple[int, ...]], found: Mapping[str, Tensor]) -> Iterator[Fault]:
    for name, shape in expected.items():
        if name not in found:
            yield Fault("", name, f"missing; a tensor of shape {list(shape)} should be there")
        elif tuple(found[name].shape) != shape:
            yield Fault("", name, f"has shape {list(found[name].shape)}; the configuration says {list(shape)}")
    for name in found:
        if name not in expected:
            yield Fault("", name, "not a tensor of this model; the configuration describes another one")


_TOKENS = {
    "bert": "bert.embeddings.word_embeddings.weight",
    "gpt": "transformer.wte.weight",
    "llama": "model.embed_tokens.weight",
}
_HEAD = {"bert": "cls.predictions.decoder.weight", "gpt": "lm_head.weight", "llama": "lm_head.weight"}


def _entries(config: ModelConfig) -> Iterator[Entry]:
    """List every tensor of the model."""
    width = config.hidden_size
    vocabulary = ((config.vocab_size, width),)
    yield Entry("tokens.weight", (_TOKENS[config.family],), vocabulary, vocabulary=True)
    if not config.tie_word_embeddings:
        yield Entry("decoder.weight", (_HEAD[config.family],), vocabulary, vocabulary=True)
    yield from {"bert": _bert_entries, "gpt": _gpt_entries, "llama": _llama_entries}[config.family](config)


def _bert_entries(config: ModelConfig) -> Iterator[Entry]:
    width, inner = config.hidden_size, config.intermediate_size
    embeddings, predictions = "bert.embeddings", "cls.predictions"
    yield _one("positions.weight", f"{embeddings}.position_embeddings.weight", config.max_position_embeddings, width)
    yield _one("segments.weight", f"{embeddings}.token_type_embeddings.weight", SEGMENTS, width)
    yield from _vectors("embedding_norm", f"{embeddings}.LayerNorm", width)
    for index in range(config.num_hidden_layers):
        ours, theirs = f"blocks.{index}", f"bert.encoder.layer.{index}"
        parts = tuple(f"{theirs}.attention.self.{part}" for part in ("query", "key", "value"))
        yield Entry(f"{ours}.attention.qkv.weight", tuple(f"{part}.weight" for part in parts), ((width, width),) * 3)
        yield Entry(f"{ours}.attention.qkv.bias", tuple(f"{part}.bias" for part in parts), ((width,),) * 3)
        yield from _linear(f"{ours}.attention.out", f"{theirs}.attention.output.dense", width, width)
        yield from _vectors(f"{ours}.attention_norm", f"{theirs}.attention.output.LayerNorm", width)
        yield from _linear(f"{ours}.mlp.up", f"{theirs}.intermediate.dense", inner, width)
        yield from _linear(f"{ours}.mlp.down", f"{theirs}.output.dense", width, inner)
        yield from _vectors(f"{ours}.mlp_norm", f"{theirs}.output.LayerNorm", width)
    yield from _linear("head_dense", f"{predictions}.transform.dense", width, width)
    yield from _vectors("head_norm", f"{predictions}.transform.LayerNorm", width)
    yield Entry("decoder_bias", (f"{predictions}.bias",), ((config.vocab_size,),), vocabulary=True)


def _gpt_entries(config: ModelConfig) -> Iterator[Entry]:
    width, inner = config.hidden_size, config.intermediate_size
    yield _one("positions.weight", "transformer.wpe.weight", config.max_position_embeddings, width)
    for index in range(config.num_hidden_layers):
        ours, theirs = f"blocks.{index}", f"transformer.h.{index}"
        yield from _vectors(f"{ours}.attention_norm", f"{theirs}.ln_1", width)
        yield from _conv1d(f"{ours}.attention.qkv", f"{theirs}.attn.c_attn", 3 * width, width)
        yield from _conv1d(f"{ours}.attention.out", f"{theirs}.attn.c_proj", width, width)
        yield from _vectors(f"{ours}.mlp_norm", f"{theirs}.ln_2", width)
        yield from _conv1d(f"{ours}.mlp.up", f"{theirs}.mlp.c_fc", inner, width)
        yield from _conv1d(f"{ours}.mlp.down", f"{theirs}.mlp.c_proj", width, inner)
    yield from _vectors("final_norm", "transformer.ln_f", width)


def _llama_entries(config: ModelConfig) -> Iterator[Entry]:
    width, inner = config.hidden_size, config.intermediate_size
    shared = config.num_key_value_heads * config.head_dim
    for index in range(config.num_hidden_layers):
        ours, theirs = f"blocks.{index}", f"model.layers.{index}"
        qkv = tuple(f"{theirs}.self_attn.{part}_proj.weight" for part in "qkv")
        yield Entry(f"{ours}.attention.qkv.weight", qkv, ((width, width), (shared, width), (shared, width)))
        yield _one(f"{ours}.attention.out.weight", f"{theirs}.self_attn.o_proj.weight", width, width)
        yield _one(f"{ours}.attention_norm.weight", f"{theirs}.input_layernorm.weight", width)
        gate_up = tuple(f"{theirs}.mlp.{part}_proj.weight" for part in ("gate", "up"))
        yield Entry(f"{ours}.mlp.gate_up.weight", gate_up, ((inner, width),) * 2)
        yield _one(f"{ours}.mlp.down.weight", f"{theirs}.mlp.down_proj.weight", width, inner)
        yield _one(f"{ours}.mlp_norm.weight", f"{theirs}.post_attention_layernorm.weight", width)
    yield _one("final_norm.weight", "model.norm.weight", width)


def _one(name: str, theirs: str, *shape: int) -> Entry:
    return Entry(name, (theirs,), (shape,))


def _vectors(name: str, theirs: str, width: int) -> Iterator[Entry]:
    yield _one(f"{name}.weight", f"{theirs}.weight", width)
    yield _one(f"{name}.bias", f"{theirs}.bias", width)


def _linear(name: str, theirs: str, rows: int, columns: int) -> Iterator[Entry]:
    yield _one(f"{name}.weight", f"{theirs}.weight", rows, columns)
    yield _one(f"{name}.bias", f"{theirs}.bias", rows)


def _conv1d(name: str, theirs: str, rows: int, columns: int) -> Iterator[Entry]:
    """GPT-2's weights lie transposed."""
    yield Entry(f"{name}.weight", (f"{theirs}.weight",), ((columns, rows),), transposed=True)
    yield _one(f"{name}.bias", f"{theirs}.bias", rows)
