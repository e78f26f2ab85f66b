"""Counts of parameters and FLOPs: equal to what is built, to transformers, and to the published numbers."""

from __future__ import annotations

import dataclasses

import pytest
import torch
from torch.utils.flop_counter import FlopCounterMode

from bigtrain.config.model import resolve_model
from bigtrain.config.schema import ModelSection
from bigtrain.models import attention, build_model, shape
from bigtrain.models.attention import Documents

FAMILIES = ("bert", "gpt", "llama")
CHANGES = (
    {},
    {"tie_word_embeddings": True},
    {"tie_word_embeddings": False},
    {"vocab_size": 128},
    {"vocab_size": 65, "num_hidden_layers": 3, "intermediate_size": 20},
)


@pytest.mark.parametrize("family", FAMILIES)
@pytest.mark.parametrize("changes", CHANGES, ids=str)
def test_stored_parameters_are_those_of_the_built_model(tiny, family, changes):
    config = tiny(family, **changes)
    with torch.device("meta"):
        model = build_model(config)
    assert shape.stored_parameters(config) == sum(parameter.numel() for parameter in model.parameters())


@pytest.mark.parametrize("family", FAMILIES)
@pytest.mark.parametrize("changes", CHANGES, ids=str)
def test_shapes_are_those_of_the_built_model_in_its_order(tiny, family, changes):
    config = tiny(family, **changes)
    with torch.device("meta"):
        model = build_model(config)
    built = [(name, tuple(parameter.shape)) for name, parameter in model.named_parameters()]
    assert list(shape.parameter_shapes(config).items()) == built
    assert shape.stored_tensors(config) == len(built)


@pytest.mark.parametrize("family", FAMILIES)
def test_the_table_names_the_parts_of_the_built_model(tiny, family):
    config = tiny(family, vocab_size=64)
    with torch.device("meta"):
        model = build_model(config)
    counts = dict.fromkeys(("embeddings", "block", "final_norm", "head"), 0)
    for name, parameter in model.named_parameters():
        part = name.split(".")[0]
        if part == "blocks":
            part = "block" if name.startswith("blocks.0.") else None
        elif part in ("tokens", "positions", "segments", "embedding_norm"):
            part = "embeddings"
        elif part != "final_norm":
            part = "head"
        if part:
            counts[part] += parameter.numel()
    assert shape.parameter_table(config) == counts


@pytest.mark.parametrize("kv_heads", (1, 2, 4))
def test_grouped_queries_save_parameters(tiny, kv_heads):
    config = tiny("llama", num_key_value_heads=kv_heads)
    full = dataclasses.replace(config, num_key_value_heads=4)
    saved = 2 * (4 - kv_heads) * config.head_dim * config.hidden_size * config.num_hidden_layers
    assert shape.parameters(full) - shape.parameters(config) == saved


@pytest.mark.parametrize(
    ("family", "preset", "vocab_size", "count"),
    [
        ("bert", "bert-base", 30522, 109_514_298),
        ("bert", "bert-large", 30522, 335_174_458),
        ("gpt", "gpt2-124m", 50257, 124_439_808),
        ("gpt", "gpt2-xl", 50257, 1_557_611_200),
        ("llama", "llama-7b", 32000, 6_738_415_616),
        ("llama", "llama-70b", 32000, 68_976_648_192),
    ],
)
def test_published_counts(family, preset, vocab_size, count):
    config = resolve_model(ModelSection(family=family, preset=preset), vocab_size=vocab_size, sequence_length=128)
    assert shape.parameters(config) == count


@pytest.mark.parametrize("family", FAMILIES)
def test_padding_is_the_only_difference_of_stored_parameters(tiny, family):
    aligned = tiny(family, vocab_size=128)
    assert shape.stored_parameters(aligned) == shape.parameters(aligned)
    assert shape.stored_parameters(tiny(family, vocab_size=100)) == shape.stored_parameters(aligned)


@pytest.mark.parametrize("family", FAMILIES)
def test_flops_of_the_blocks_are_those_that_torch_counts(tiny, family, monkeypatch):
    # torch counts no products inside a fused kernel for CPUs.
    monkeypatch.setattr(attention, "attention_path", lambda *case: "per_document")
    config = tiny(family, num_key_value_heads=4)
    model, length = build_model(config), 24
    documents = Documents.of_lengths([length])
    rotary = model.rotary(torch.arange(length))
    x = torch.randn(length, config.hidden_size, requires_grad=True)
    with FlopCounterMode(display=False) as counter, torch.nn.attention.sdpa_kernel(torch.nn.attention.SDPBackend.MATH):
        for block in model.blocks:
            x = block(x, documents, rotary)
        x.sum().backward()
    assert counter.get_total_flops() == length * shape.flops_per_token(config, length, labelled_fraction=0.0)


def test_flops_of_the_head_follow_the_labelled_share(tiny):
    for family, extra in (("bert", 6 * 32 * 32), ("gpt", 0), ("llama", 0)):
        config = tiny(family)
        full = shape.flops_per_token(config, 16)
        none = shape.flops_per_token(config, 16, labelled_fraction=0.0)
        assert full - none == 6 * 32 * config.vocab_size + extra
        assert shape.flops_per_token(config, 16, labelled_fraction=0.25) == pytest.approx(
            none + (full - none) / 4, abs=1
        )


def test_flops_by_hand():
    config = resolve_model(ModelSection(family="gpt", preset="gpt2-124m"), vocab_size=50257, sequence_length=1024)
    blocks = 6 * 12 * (4 * 768 * 768 + 8 * 768 * 768)
    assert shape.flops_per_token(config, 1024) == blocks + 12 * 12 * 1024 * 768 + 6 * 768 * 50257


@pytest.mark.parametrize(
    ("vocab", "device", "tokens"),
    [(8192, "cpu", 2048), (30528, "cpu", 549), (8192, "cuda", 4096), (2**24, "cpu", 64), (2**24, "cuda", 64)],
)
def test_chunks_of_logits_stay_under_their_limit(vocab, device, tokens):
    assert shape.loss_chunk_tokens(vocab, device) == tokens
    assert tokens == 64 or 4 * tokens * vocab <= shape.LOSS_CHUNK_BYTES[device]


@pytest.mark.parametrize("family", ["bert", "gpt", "llama"])
def test_ranks_that_share_products_have_a_part_of_each_section(tiny, family):
    config = tiny(family)
    whole, mine = shape.parameter_shapes(config), shape.parameter_shapes(config, 2)
    products = shape.shared_products(config)
    for name, size in whole.items():
        layer = name.removeprefix("blocks.0.").rpartition(".")[0]
        dim, sections = products.get(layer, (None, ()))
        if dim is not None and name.startswith("blocks.0."):
            assert dim >= len(size) or size[dim] == sum(sections)
            cut = dim < len(size) and not (dim == 1 and name.endswith(".bias"))
            assert mine[name] == (tuple(n // 2 if cut and d == dim else n for d, n in enumerate(size)))
        elif not name.startswith("blocks."):
            assert mine[name] == size


@pytest.mark.parametrize(("family", "dropout", "read"), [("bert", 0.0, True), ("gpt", 0.1, True), ("gpt", 0.0, False)])
def test_what_a_blocks_end_is_read_for(tiny, family, dropout, read):
    assert shape.reads_its_end(tiny(family), dropout) == read
