"""The tensors of each family: our name, Hugging Face's names, and how the one lies in the other."""

from __future__ import annotations

import re
from collections.abc import Iterator
from typing import NamedTuple

from bigtrain.config.model import ModelConfig
from bigtrain.models.shape import NEXT_SENTENCE_CLASSES, SEGMENTS

PREFIX = {"bert": "bert.", "gpt": "transformer.", "llama": "model."}
"""What names the model without its head; a checkpoint of that model alone leaves it out."""

NOT_WEIGHTS = re.compile(
    r".*(\.attn\.(masked_)?bias|embeddings\.position_ids|rotary_emb\.inv_freq)"
    r"|bert\.pooler\..*|cls\.seq_relationship\..*"
)
"""Constant buffers of older versions, and parts that the masked-language and causal models do not have."""

NEXT_SENTENCE = re.compile(r"(bert\.pooler\.dense|cls\.seq_relationship)\..*")
"""Of the latter, those of a model with a next-sentence head."""

TOKENS = {
    "bert": "bert.embeddings.word_embeddings.weight",
    "gpt": "transformer.wte.weight",
    "llama": "model.embed_tokens.weight",
}
HEAD = {"bert": "cls.predictions.decoder.weight", "gpt": "lm_head.weight", "llama": "lm_head.weight"}
BERT_BIAS = "cls.predictions.bias"
BERT_DECODER_BIAS = "cls.predictions.decoder.bias"


class Entry(NamedTuple):
    """One of our tensors: its name, the names there whose rows it joins, the shape of each there."""

    name: str
    theirs: tuple[str, ...]
    shapes: tuple[tuple[int, ...], ...]
    transposed: bool = False
    vocabulary: bool = False


def tensor_entries(config: ModelConfig) -> Iterator[Entry]:
    """List every tensor of the model."""
    width = config.hidden_size
    vocabulary = ((config.vocab_size, width),)
    yield Entry("tokens.weight", (TOKENS[config.family],), vocabulary, vocabulary=True)
    if not config.tie_word_embeddings:
        yield Entry("decoder.weight", (HEAD[config.family],), vocabulary, vocabulary=True)
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
    yield Entry("decoder_bias", (BERT_BIAS,), ((config.vocab_size,),), vocabulary=True)
    if config.next_sentence:
        yield from _linear("next_sentence.pooler", "bert.pooler.dense", width, width)
        yield from _linear("next_sentence.head", "cls.seq_relationship", NEXT_SENTENCE_CLASSES, width)


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
