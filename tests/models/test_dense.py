"""The same weights on padded batches: what the flat row gives."""

from __future__ import annotations

import pytest
import torch
import torch.nn.functional as F

from bigtrain.models import build_model
from bigtrain.models.dense import dense_hidden, dense_logits, shared_heads


@pytest.mark.parametrize("family", ["bert", "gpt", "llama"])
def test_rows_side_by_side_give_the_logits_of_rows_end_to_end(tiny, flat_row, torch_seed, family):
    config = tiny(family)
    model = build_model(config).eval()
    ids = torch.randint(0, config.vocab_size, (3, 9))

    def attend(_, q, k, v):
        keys, values = (shared_heads(part, q.shape[1]) for part in (k, v))
        return F.scaled_dot_product_attention(q, keys, values, is_causal=config.causal)

    flat = flat_row(list(ids))
    with torch.no_grad():
        right = model.logits(flat["input_ids"], flat["position_ids"], flat["cu_seqlens"])
        found = dense_logits(model, dense_hidden(model, ids, torch.arange(9).expand(3, 9), attend))
    torch.testing.assert_close(found.flatten(0, 1), right, rtol=1e-5, atol=1e-5)


def test_heads_are_given_to_their_neighbours():
    shared = torch.arange(2.0)[None, :, None, None]
    assert shared_heads(shared, 4).flatten().tolist() == [0, 0, 1, 1]
    assert shared_heads(shared, 2) is shared
