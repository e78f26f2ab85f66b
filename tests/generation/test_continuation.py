"""Rows continued: as transformers does, side by side, and beyond what the model reads at once."""

from __future__ import annotations

import json

import pytest
import torch
from safetensors.torch import save_file

from bigtrain.generation.choice import Choice
from bigtrain.generation.continuation import continue_rows
from bigtrain.models.hf import to_hugging_face

GREEDY = Choice(temperature=0)


@pytest.mark.parametrize("family", ["gpt", "llama"])
def test_greedy_output_is_that_of_transformers_token_by_token(decoder, tmp_path, family):
    import transformers

    model = decoder(family, tie_word_embeddings=False)
    config_json, tensors = to_hugging_face(model.config, model.state_dict())
    (tmp_path / "config.json").write_text(json.dumps(config_json))
    save_file(tensors, tmp_path / "model.safetensors", metadata={"format": "pt"})
    theirs = transformers.AutoModelForCausalLM.from_pretrained(tmp_path).eval()
    rows = [torch.randint(0, 100, (length,)).tolist() for length in (1, 5, 12, 3)]
    ours = continue_rows(model, rows, tokens=25, choice=GREEDY).rows
    for row, found in zip(rows, ours, strict=True):
        options = {"max_new_tokens": 25, "do_sample": False, "eos_token_id": None, "pad_token_id": 0}
        mask = torch.ones(1, len(row), dtype=torch.int64)
        right = theirs.generate(input_ids=torch.tensor([row]), attention_mask=mask, **options)[0].tolist()
        assert found == right
    assert len({token for row, found in zip(rows, ours, strict=True) for token in found[len(row) :]}) > 20


def test_beyond_its_positions_a_row_goes_on_from_its_later_half(decoder, flat_logits):
    model = decoder("gpt", max_position_embeddings=8)
    row = [3, 1, 4]
    found = continue_rows(model, [row], tokens=20, choice=GREEDY)
    window, text = list(row), list(row)
    for _ in range(20):
        token = int(flat_logits(model, window)[-1].argmax())
        text.append(token)
        window.append(token)
        if len(window) > 8:
            window = window[-4:]
    assert found.rows == [text]
    assert found.kept == 4


def test_rows_are_continued_as_if_each_were_alone(decoder):
    model = decoder("llama", max_position_embeddings=16)
    rows = [[5], [1, 2, 3, 4, 5, 6, 7, 8, 9, 10, 11, 12, 13, 14], [8, 9, 3]]
    together = continue_rows(model, rows, tokens=18, choice=GREEDY)
    for row, found in zip(rows, together.rows, strict=True):
        assert continue_rows(model, [row], tokens=18, choice=GREEDY).rows == [found]
    assert together.kept == 8


def test_a_row_ends_where_its_document_does(decoder):
    model = decoder("gpt")
    rows = [[5, 6], [7]]
    free = continue_rows(model, rows, tokens=12, choice=GREEDY).rows
    end = free[0][5]
    stopped = continue_rows(model, rows, tokens=12, choice=GREEDY, ends={end}).rows
    for row, whole, found in zip(rows, free, stopped, strict=True):
        after = whole[len(row) :]
        assert found == row + (after[: after.index(end)] if end in after else after)
    assert continue_rows(model, rows, tokens=12, choice=GREEDY).kept is None
