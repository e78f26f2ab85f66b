"""With keys and values kept the logits are those of reading everything again."""

from __future__ import annotations

import pytest
import torch

from bigtrain.generation.reader import Reader


@pytest.mark.parametrize("family", ["gpt", "llama"])
def test_a_token_at_a_time_gives_the_logits_of_the_whole(decoder, flat_logits, family):
    model = decoder(family)
    row = torch.randint(0, 100, (20,)).tolist()
    right = flat_logits(model, row)
    reader = Reader(model, 1, 20)
    found = [reader.read([row[:6]]), *(reader.add([token]) for token in row[6:])]
    torch.testing.assert_close(torch.cat(found), right[5:], rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize("family", ["gpt", "llama"])
def test_rows_of_uneven_length_do_not_see_each_other(decoder, flat_logits, family):
    model = decoder(family)
    rows = [torch.randint(0, 100, (length,)).tolist() for length in (1, 9, 4)]
    more = torch.randint(0, 100, (5, 3)).tolist()
    reader = Reader(model, 3, 14)
    found = [reader.read(rows), *(reader.add(tokens) for tokens in more)]
    for number, row in enumerate(rows):
        whole = row + [tokens[number] for tokens in more]
        right = flat_logits(model, whole)[len(row) - 1 :]
        torch.testing.assert_close(torch.stack([step[number] for step in found]), right, rtol=1e-5, atol=1e-5)


def test_reading_again_forgets(decoder, flat_logits):
    model = decoder("gpt")
    reader = Reader(model, 1, 12)
    reader.read([[7, 8, 9, 10, 11]])
    reader.add([12])
    reader.read([[1, 2]])
    torch.testing.assert_close(reader.add([3]), flat_logits(model, [1, 2, 3])[-1:], rtol=1e-5, atol=1e-5)


def test_the_cache_is_allocated_once(decoder):
    reader = Reader(decoder("gpt"), 2, 10)
    place = reader.cache.keys.data_ptr()
    reader.read([[1], [2, 3]])
    for token in range(8):
        reader.add([token, token])
    assert reader.cache.keys.data_ptr() == place
