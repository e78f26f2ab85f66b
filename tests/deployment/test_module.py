"""A model behind padded rows and a mask gives the logits that it gives for flat rows."""

from __future__ import annotations

import torch

from bigtrain.deployment.module import PaddedModel


def test_padding_before_and_after_changes_nothing(traced, padded, right_logits):
    model, _ = traced
    ids, mask = padded(4, 11)
    with torch.no_grad():
        found = PaddedModel(model)(ids, mask)
    torch.testing.assert_close(found[mask.bool()], right_logits(model, ids, mask), rtol=1e-5, atol=1e-5)
    assert found.isfinite().all()


def test_the_weights_are_the_model_s_own(traced):
    model, _ = traced
    own = {parameter.data_ptr() for parameter in model.parameters()}
    assert {parameter.data_ptr() for parameter in PaddedModel(model).parameters()} == own
