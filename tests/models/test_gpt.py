"""Decoders: see backwards only; GPT-2 learns its positions, Llama turns by them."""

from __future__ import annotations

import pytest
import torch
from torch import nn

from bigtrain.models import build_model

FAMILIES = ("gpt", "llama")


@pytest.fixture(params=FAMILIES)
def model(request, tiny, torch_seed):
    return build_model(tiny(request.param)).eval()


@pytest.fixture
def document(torch_seed):
    return {
        "input_ids": torch.randint(0, 100, (10,)),
        "position_ids": torch.arange(10),
        "cu_seqlens": torch.tensor([0, 10], dtype=torch.int32),
    }


def test_a_token_sees_itself_and_what_came_before(model, document):
    before = model.logits(**document)
    document["input_ids"][4] = (document["input_ids"][4] + 1) % 100
    changed = (model.logits(**document) - before).abs().amax(1) > 1e-6
    assert changed.tolist() == [False] * 4 + [True] * 6


def test_the_logits_of_a_prefix_are_a_prefix_of_the_logits(model, document):
    whole = model.logits(**document)
    prefix = {name: value[:6] for name, value in document.items() if name != "cu_seqlens"}
    found = model.logits(**prefix, cu_seqlens=torch.tensor([0, 6], dtype=torch.int32))
    torch.testing.assert_close(found, whole[:6], rtol=1e-5, atol=1e-5)


def test_positions_are_learned_or_rotary(tiny, document):
    ids, positions = document["input_ids"], document["position_ids"]
    gpt, llama = (build_model(tiny(family)).eval() for family in FAMILIES)
    assert gpt.rotary(positions) is None
    torch.testing.assert_close(gpt.embed(ids, positions), gpt.tokens.weight[ids] + gpt.positions.weight[positions])
    assert llama.positions is None
    assert torch.equal(llama.embed(ids, positions), llama.tokens.weight[ids])
    cos, sin = llama.rotary(positions)
    assert cos.shape == sin.shape == (10, 1, 4)


@pytest.mark.parametrize("theta", (100.0, 1e6))
def test_the_base_of_the_rotary_frequencies_is_used(tiny, theta):
    cos, _ = build_model(tiny("llama", rope_theta=theta)).rotary(torch.tensor([1]))
    assert cos[0, 0, 1].item() == pytest.approx(torch.tensor(theta ** (-2 / 8)).cos().item())


def test_rotary_positions_count_by_distance(tiny, document, torch_seed):
    """A causal rotary model gives the same logits wherever its document starts; one with learned positions does not."""
    moved = {**document, "position_ids": document["position_ids"] + 13}
    gpt, llama = (build_model(tiny(family)).eval() for family in FAMILIES)
    torch.testing.assert_close(llama.logits(**moved), llama.logits(**document), rtol=1e-4, atol=1e-4)
    assert not torch.allclose(gpt.logits(**moved), gpt.logits(**document), rtol=1e-2, atol=1e-2)


def test_norms_are_the_familys(tiny):
    gpt, llama = (build_model(tiny(family)) for family in FAMILIES)
    assert isinstance(gpt.final_norm, nn.LayerNorm)
    assert isinstance(llama.final_norm, nn.RMSNorm)
    assert (gpt.final_norm.eps, llama.final_norm.eps) == (1e-5, 1e-6)


def test_hidden_states_are_normalized(model, document):
    hidden = model.hidden(**document)
    torch.testing.assert_close(hidden.square().mean(1), torch.ones(10), rtol=1e-2, atol=1e-2)
    assert torch.equal(model.head(hidden), hidden)


@pytest.mark.parametrize("family", FAMILIES)
def test_heads_may_be_tied_or_not(tiny, family):
    tied = build_model(tiny(family, tie_word_embeddings=True))
    untied = build_model(tiny(family, tie_word_embeddings=False))
    assert tied.decoder_weights() == (tied.tokens.weight, None)
    assert untied.decoder_weights() == (untied.decoder.weight, None)


def test_dropout_acts_on_the_embedding(tiny, document, torch_seed):
    model = build_model(tiny("gpt"), dropout=0.5)
    where = (document["input_ids"], document["position_ids"])
    assert (model.embed(*where) == 0).float().mean().item() == pytest.approx(0.5, abs=0.1)
    assert model.eval().embed(*where).all()
