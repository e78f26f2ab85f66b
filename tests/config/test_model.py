"""From a model section to a shape."""

from __future__ import annotations

from bigtrain.config.model import resolve_model
from bigtrain.config.schema import ModelSection


def shape(**keys):
    return resolve_model(ModelSection(**keys), vocab_size=1000, sequence_length=256)


def test_without_a_preset():
    model = shape(family="gpt", hidden_size=64, num_hidden_layers=2, num_attention_heads=4)
    assert (model.intermediate_size, model.num_key_value_heads, model.head_dim) == (256, 4, 16)
    assert (model.vocab_size, model.padded_vocab_size, model.max_position_embeddings) == (1000, 1024, 256)


def test_keys_go_over_the_preset():
    model = shape(family="bert", preset="bert-base", num_hidden_layers=3, vocab_size=1024)
    assert (model.hidden_size, model.num_hidden_layers, model.vocab_size) == (768, 3, 1024)
    assert model.padded_vocab_size == 1024


def test_family_defaults():
    small = {"hidden_size": 64, "num_hidden_layers": 1, "num_attention_heads": 1}
    bert, gpt, llama = (shape(family=family, **small) for family in ("bert", "gpt", "llama"))
    assert (bert.norm_eps, gpt.norm_eps, llama.norm_eps) == (1e-12, 1e-5, 1e-6)
    assert (bert.tie_word_embeddings, gpt.tie_word_embeddings, llama.tie_word_embeddings) == (True, True, False)
    assert (bert.causal, gpt.causal, llama.causal) == (False, True, True)


def test_family_defaults_can_be_written_over():
    model = shape(family="llama", preset="llama-7b", tie_word_embeddings=True, norm_eps=1e-5, rope_theta=5e5)
    assert (model.tie_word_embeddings, model.norm_eps, model.rope_theta) == (True, 1e-5, 5e5)


def test_fewer_heads_than_the_preset_keep_their_own_keys_and_values():
    assert shape(family="llama", preset="llama-7b", num_attention_heads=8).num_key_value_heads == 8


def test_positions_are_the_larger_of_preset_and_rows():
    assert shape(family="bert", preset="bert-base").max_position_embeddings == 512
    assert shape(family="bert", preset="bert-base", max_position_embeddings=300).max_position_embeddings == 300
    long = resolve_model(ModelSection(family="bert", preset="bert-base"), vocab_size=9, sequence_length=2048)
    assert long.max_position_embeddings == 2048
