"""The table of names covers every tensor of the models here, once."""

from __future__ import annotations

import math

import pytest
import torch

from bigtrain.models import build_model
from bigtrain.models.hf_names import HEAD, NOT_WEIGHTS, PREFIX, TOKENS, tensor_entries

FAMILIES = ("bert", "gpt", "llama")


@pytest.mark.parametrize("family", FAMILIES)
@pytest.mark.parametrize("tied", (True, False))
def test_every_tensor_has_an_entry(tiny, family, tied):
    config = tiny(family, tie_word_embeddings=tied, vocab_size=64)
    with torch.device("meta"):
        state = build_model(config).state_dict()
    entries = list(tensor_entries(config))
    assert sorted(entry.name for entry in entries) == sorted(state)
    for entry in entries:
        assert sum(math.prod(shape) for shape in entry.shapes) == state[entry.name].numel(), entry.name
        assert len(entry.theirs) == len(entry.shapes)


@pytest.mark.parametrize("family", FAMILIES)
def test_no_name_is_taken_twice(tiny, family):
    theirs = [name for entry in tensor_entries(tiny(family)) for name in entry.theirs]
    assert len(theirs) == len(set(theirs))
    assert all(name.startswith((PREFIX[family], "cls.", "lm_head.")) for name in theirs)
    assert not any(NOT_WEIGHTS.fullmatch(name) for name in theirs)


@pytest.mark.parametrize("family", FAMILIES)
def test_only_vocabulary_tensors_are_padded(tiny, family):
    padded = {entry.name for entry in tensor_entries(tiny(family, tie_word_embeddings=False)) if entry.vocabulary}
    assert padded == {"tokens.weight", "decoder.weight"} | ({"decoder_bias"} if family == "bert" else set())


def test_only_gpt2_lies_transposed(tiny):
    for family in FAMILIES:
        transposed = {entry.name.split(".", 2)[-1] for entry in tensor_entries(tiny(family)) if entry.transposed}
        right = {"attention.qkv.weight", "attention.out.weight", "mlp.up.weight", "mlp.down.weight"}
        assert transposed == (right if family == "gpt" else set())


@pytest.mark.parametrize("family", FAMILIES)
def test_the_tied_pair_is_in_the_table(tiny, family):
    names = {name for entry in tensor_entries(tiny(family, tie_word_embeddings=False)) for name in entry.theirs}
    assert {TOKENS[family], HEAD[family]} <= names
    tied = {name for entry in tensor_entries(tiny(family, tie_word_embeddings=True)) for name in entry.theirs}
    assert names - tied == {HEAD[family]}


@pytest.mark.parametrize(
    ("name", "passed_over"),
    [
        ("transformer.h.11.attn.bias", True),
        ("transformer.h.11.attn.masked_bias", True),
        ("transformer.h.11.attn.c_attn.bias", False),
        ("bert.embeddings.position_ids", True),
        ("bert.embeddings.position_embeddings.weight", False),
        ("model.layers.3.self_attn.rotary_emb.inv_freq", True),
        ("bert.pooler.dense.weight", True),
        ("cls.seq_relationship.weight", True),
        ("cls.predictions.bias", False),
    ],
)
def test_what_is_not_a_weight_here(name, passed_over):
    assert bool(NOT_WEIGHTS.fullmatch(name)) == passed_over
