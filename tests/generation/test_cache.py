"""What keys and values take."""

from __future__ import annotations

import pytest

from bigtrain.generation.cache import Cache, cache_bytes


@pytest.mark.parametrize("family", ["gpt", "llama"])
def test_a_cache_takes_what_is_predicted(decoder, family):
    model = decoder(family, num_hidden_layers=3)
    cache = Cache(model.config, 2, 17, like=model.tokens.weight)
    assert cache.bytes == cache_bytes(model.config, 2, 17)


def test_heads_that_share_keys_keep_them_once(decoder):
    shared, full = decoder("llama").config, decoder("llama", num_key_value_heads=4).config
    assert 2 * cache_bytes(shared, 1, 10) == cache_bytes(full, 1, 10)
