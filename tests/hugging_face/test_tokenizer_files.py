"""What stands beside tokenizer.json: transformers reads the same tokens out of it, without a warning."""

from __future__ import annotations

import json
from pathlib import Path

import pytest

from bigtrain.config.model import ModelConfig
from bigtrain.data.tokenizer import special_tokens, train_tokenizer
from bigtrain.data.vocabulary import SpecialTokens
from bigtrain.errors import InputError
from bigtrain.hugging_face import tokenizer_files
from bigtrain.hugging_face.tokenizer_files import generation_config, read_kept, special_ids, tokenizer_config

TEXTS = ["the river falls slowly and the Bird sings again, éa", "hello world 12 foo: bar"] * 20


def shape(family: str) -> ModelConfig:
    sizes = {"vocab_size": 300, "hidden_size": 32, "num_hidden_layers": 1, "num_attention_heads": 2}
    return ModelConfig(  # type: ignore[arg-type]
        family=family, num_key_value_heads=2, intermediate_size=64, max_position_embeddings=40, **sizes
    )


@pytest.mark.parametrize("family", ("bert", "gpt", "llama"))
def test_transformers_reads_the_same_tokens(tmp_path: Path, family: str, warned: list[str]) -> None:
    from transformers import AutoTokenizer

    size = 120 if family == "bert" else 300
    own = train_tokenizer(TEXTS, family, size, family == "bert")  # type: ignore[arg-type]
    marks = special_tokens(own)
    (tmp_path / "tokenizer.json").write_text(own.to_str())
    written = tokenizer_config(shape(family), own, marks)
    (tmp_path / "tokenizer_config.json").write_text(json.dumps(written))
    theirs = AutoTokenizer.from_pretrained(tmp_path)
    text = "the Bird [MASK] sings éé 12: bar"
    assert theirs(text)["input_ids"] == own.encode(text).ids
    assert theirs.model_max_length == 40
    assert not warned
    if family == "bert":
        ids = (theirs.cls_token_id, theirs.sep_token_id, theirs.mask_token_id, theirs.pad_token_id, theirs.unk_token_id)
        assert ids == (marks.bos, marks.eos, marks.mask, marks.pad, marks.unk)
        assert "token_type_ids" in theirs(text)
    else:
        assert (theirs.eos_token_id, theirs.bos_token_id, theirs.pad_token_id) == (marks.eos, None, None)
        assert "token_type_ids" not in theirs(text)  # GPT-2 would read them as tokens


def test_the_ids_are_those_that_came_else_those_of_the_tokenizer() -> None:
    marks = SpecialTokens(pad=0, bos=2, eos=3, mask=4, unk=1)
    none = {"bos_token_id": None, "eos_token_id": None, "pad_token_id": None}
    assert special_ids(shape("bert"), marks, {}) == none | {"pad_token_id": 0}
    assert special_ids(shape("llama"), marks, {"eos_token_id": 9}) == {
        "bos_token_id": 2,
        "eos_token_id": 9,
        "pad_token_id": 0,
    }
    several = {"bos_token_id": 7, "eos_token_id": [9, 0], "pad_token_id": [300, 1]}
    assert special_ids(shape("gpt"), SpecialTokens(eos=3), several) == several | {"pad_token_id": None}
    assert special_ids(shape("gpt"), marks, {"eos_token_id": [], "bos_token_id": -1})["eos_token_id"] == 3
    came = {"bos_token_id": 50256, "eos_token_id": 299, "pad_token_id": True}
    assert special_ids(shape("gpt"), None, came) == none | {"eos_token_id": 299}
    assert special_ids(shape("gpt"), None, {}) == none
    assert generation_config(none | {"eos_token_id": 7}) == {"_from_model_config": True, "eos_token_id": 7}


def test_what_is_kept_is_bounded_and_nothing_else_is_read(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    for name in ("tokenizer.json", "vocab.txt", "merges.txt", "code.py", "model.safetensors"):
        (tmp_path / name).write_bytes(name.encode())
    (tmp_path / "tokenizer.model").mkdir()
    kept = {"source-tokenizer.json": b"tokenizer.json", "vocab.txt": b"vocab.txt", "merges.txt": b"merges.txt"}
    assert read_kept(tmp_path) == kept
    for text, fault in (("[5]", "not a JSON object"), ("{", "Expecting")):
        (tmp_path / "generation_config.json").write_text(text)
        with pytest.raises(
            InputError, match=rf"generation_config\.json: {fault}.*; put the model's own there, or remove"
        ):
            read_kept(tmp_path)
    (tmp_path / "generation_config.json").unlink()
    monkeypatch.setattr(tokenizer_files, "LARGEST_TOKENIZER_BYTES", 9)
    with pytest.raises(InputError, match=r"merges\.txt: larger than 0 MiB; put the model's own there"):
        read_kept(tmp_path)
