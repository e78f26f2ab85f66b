"""Building: the same weights from the same seed, in place or from the meta device."""

from __future__ import annotations

import subprocess
import sys

import pytest
import torch

import bigtrain.models
from bigtrain.models import build_model
from bigtrain.models.bert import Bert
from bigtrain.models.gpt import Decoder
from bigtrain.models.layers import Block

FAMILIES = ("bert", "gpt", "llama")


def reset(model):
    """Initialise as the engine does."""
    for module in model.modules():
        if list(module.parameters(recurse=False)):
            module.reset_parameters()


@pytest.mark.parametrize(("family", "kind"), [("bert", Bert), ("gpt", Decoder), ("llama", Decoder)])
def test_each_family_has_its_model(tiny, family, kind):
    config = tiny(family)
    model = build_model(config, dropout=0.1, attention_dropout=0.2, z_loss=0.3, label_smoothing=0.4)
    assert type(model) is kind
    assert model.config is config
    assert {type(block) for block in model.blocks} == {Block}
    assert len(model.blocks) == config.num_hidden_layers
    assert (model.z_loss, model.label_smoothing, model.dropout.p) == (0.3, 0.4, 0.1)
    assert {(block.dropout.p, block.attention.dropout) for block in model.blocks} == {(0.1, 0.2)}


@pytest.mark.parametrize("family", FAMILIES)
@pytest.mark.parametrize("tied", (True, False))
def test_meta_and_real_builds_start_from_the_same_weights(tiny, family, tied):
    config = tiny(family, tie_word_embeddings=tied)
    torch.manual_seed(5)
    real = build_model(config)
    with torch.device("meta"):
        model = build_model(config)
    assert all(parameter.is_meta for parameter in model.parameters())
    model.to_empty(device="cpu")
    torch.manual_seed(5)
    reset(model)
    assert list(real.state_dict()) == list(model.state_dict())
    assert all(torch.equal(value, model.state_dict()[name]) for name, value in real.state_dict().items())


@pytest.mark.parametrize("family", FAMILIES)
def test_another_seed_gives_other_weights(tiny, family):
    torch.manual_seed(5)
    first = build_model(tiny(family))
    second = build_model(tiny(family))
    assert not torch.equal(first.tokens.weight, second.tokens.weight)


@pytest.mark.parametrize("family", FAMILIES)
def test_every_weight_starts_as_documented(torch_seed, tiny, family):
    config = tiny(family, hidden_size=128, intermediate_size=256, initializer_range=0.02, tie_word_embeddings=False)
    for name, parameter in build_model(config).named_parameters():
        if name.endswith("bias"):
            assert not parameter.any(), name
        elif "norm" in name:
            assert torch.equal(parameter, torch.ones_like(parameter)), name
        else:
            spread = 0.01 if family == "gpt" and name.endswith(("out.weight", "down.weight")) else 0.02
            rows = parameter[: config.vocab_size] if parameter.shape[0] == config.padded_vocab_size else parameter
            assert rows.std().item() == pytest.approx(spread, rel=0.15), name


@pytest.mark.parametrize("family", FAMILIES)
def test_nothing_but_parameters_is_kept(tiny, family):
    model = build_model(tiny(family))
    assert not list(model.buffers())
    assert set(model.state_dict()) == {name for name, _ in model.named_parameters()}


def test_an_unknown_name_is_an_attribute_error():
    with pytest.raises(AttributeError, match="no attribute 'build_modle'"):
        _ = bigtrain.models.build_modle


def test_shapes_need_no_torch():
    code = "import sys; sys.modules['torch'] = None; import bigtrain.models.shape, bigtrain.models"
    assert subprocess.run([sys.executable, "-c", code], check=False).returncode == 0
