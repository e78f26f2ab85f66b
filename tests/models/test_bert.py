"""BERT: sees both ways, has a head of its own, follows the published layout."""

from __future__ import annotations

import pytest
import torch
import torch.nn.functional as F

from bigtrain.models import build_model
from bigtrain.models.attention import Documents


@pytest.fixture
def model(tiny, torch_seed):
    return build_model(tiny("bert")).eval()


@pytest.fixture
def document(torch_seed):
    return {
        "input_ids": torch.randint(0, 100, (10,)),
        "position_ids": torch.arange(10),
        "cu_seqlens": torch.tensor([0, 10], dtype=torch.int32),
    }


def test_every_token_sees_every_other(model, document):
    before = model.logits(**document)
    document["input_ids"][4] += 1 if document["input_ids"][4] < 50 else -1
    assert ((model.logits(**document) - before).abs().amax(1) > 1e-6).all()


def test_embedding_is_the_normalized_sum_of_three(model, document):
    ids, positions = document["input_ids"], document["position_ids"]
    total = model.tokens.weight[ids] + model.positions.weight[positions] + model.segments.weight[0]
    right = F.layer_norm(total, (32,), eps=1e-12)
    torch.testing.assert_close(model.embed(ids, positions), right, rtol=1e-5, atol=1e-5)


def test_only_the_first_segment_is_read(model, document):
    model.logits(**document).sum().backward()
    assert model.segments.weight.grad[0].any()
    assert not model.segments.weight.grad[1].any()


def test_blocks_end_the_hidden_states(model, document):
    x = model.embed(document["input_ids"], document["position_ids"])
    for block in model.blocks:
        x = block(x, Documents.of_lengths([10]))
    torch.testing.assert_close(model.hidden(**document), x)
    assert model.rotary(document["position_ids"]) is None


def test_the_head_is_dense_gelu_norm(model):
    hidden = torch.randn(3, 32)
    dense = F.linear(hidden, model.head_dense.weight, model.head_dense.bias)
    torch.testing.assert_close(model.head(hidden), F.layer_norm(F.gelu(dense), (32,), eps=1e-12), rtol=1e-5, atol=1e-5)


def test_the_decoder_is_tied_and_has_a_bias(tiny, model):
    weight, bias = model.decoder_weights()
    assert weight is model.tokens.weight
    assert bias is model.decoder_bias
    untied = build_model(tiny("bert", tie_word_embeddings=False))
    assert untied.decoder_weights() == (untied.decoder.weight, untied.decoder_bias)
    assert untied.decoder.weight is not untied.tokens.weight


def test_the_decoder_bias_shifts_logits(model, document):
    before = model.logits(**document)
    with torch.no_grad():
        model.decoder_bias += torch.arange(128.0)
    torch.testing.assert_close(model.logits(**document), before + torch.arange(100.0), rtol=1e-5, atol=1e-4)


def test_only_labelled_positions_reach_the_head(model, document, monkeypatch):
    seen = []
    monkeypatch.setattr(model, "head", lambda hidden: seen.append(hidden.shape[0]) or hidden)
    model(**document, labels=torch.tensor([5, 6]), label_positions=torch.tensor([2, 7]))
    assert seen == [2]


def test_dropout_acts_on_the_embedding(tiny, document, torch_seed):
    model = build_model(tiny("bert"), dropout=0.5)
    where = (document["input_ids"], document["position_ids"])
    assert (model.embed(*where) == 0).float().mean().item() == pytest.approx(0.5, abs=0.1)
    assert model.eval().embed(*where).all()
