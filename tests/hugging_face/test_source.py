"""A Hugging Face folder as it comes: what is read of it, and what is refused."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import save_file

from bigtrain.errors import InputError
from bigtrain.hugging_face import source
from bigtrain.hugging_face.source import are_equal, read_config, read_tensors

BERT = {"architectures": ["BertForMaskedLM"]}


def test_one_file_and_shards_read_the_same(tmp_path: Path) -> None:
    tensors = {name: torch.randn(3, 4) for name in "abc"}
    save_file(tensors, tmp_path / "model.safetensors", metadata={"format": "pt"})
    whole = {name: found.read() for name, found in read_tensors(tmp_path, {}).items()}
    (tmp_path / "model.safetensors").unlink()
    save_file({"a": tensors["a"]}, tmp_path / "model-1.safetensors")
    save_file({name: tensors[name] for name in "bc"}, tmp_path / "model-2.safetensors")
    places = {"a": "model-1.safetensors", "b": "model-2.safetensors", "c": "model-2.safetensors"}
    (tmp_path / "model.safetensors.index.json").write_text(json.dumps({"weight_map": places}))
    shards = {name: found.read() for name, found in read_tensors(tmp_path, {}).items()}
    assert all(torch.equal(found[name], tensors[name]) for found in (whole, shards) for name in tensors)


@pytest.mark.parametrize(
    ("index", "text"),
    [
        ("{", "not an index of safetensors"),
        ('{"weight_map": [1]}', "not an index of safetensors"),
        ('{"weight_map": {"a": "../other.safetensors"}}', "is no file of this folder"),
        ('{"weight_map": {"a": "model-9.safetensors"}}', "its shard model-9.safetensors is missing"),
        ('{"weight_map": {"b": "model-1.safetensors"}}', "b is not in model-1.safetensors"),
    ],
)
def test_an_index_that_does_not_fit_is_refused(tmp_path: Path, index: str, text: str) -> None:
    save_file({"a": torch.ones(2)}, tmp_path / "model-1.safetensors")
    (tmp_path / "model.safetensors.index.json").write_text(index)
    with pytest.raises(InputError, match=text):
        read_tensors(tmp_path, {})


def test_a_pickle_is_never_opened(tmp_path: Path) -> None:
    (tmp_path / "pytorch_model.bin").write_bytes(b"cos\nsystem\n(S'exit 9'\ntR.")
    with pytest.raises(InputError, match=r"is a pickle, .* convert it: transformers\.BertForMaskedLM\.from_pre"):
        read_tensors(tmp_path, BERT)
    with pytest.raises(InputError, match=r"transformers\.GPT2LMHeadModel\.from"):
        read_tensors(tmp_path, {"architectures": ["GPT2LMHeadModel"]})
    (tmp_path / "pytorch_model.bin").unlink()
    with pytest.raises(InputError, match="holds neither model.safetensors nor"):
        read_tensors(tmp_path, BERT)


@pytest.mark.parametrize(
    ("content", "text"),
    [
        (None, "no config.json in it"),
        ("[1]", "not a JSON object"),
        ("{", "should hold one JSON object"),
        ('{"quantization_config": {"bits": 4}}', "quantization_config: quantized weights are not supported"),
    ],
)
def test_a_config_that_cannot_be_used_is_refused(tmp_path: Path, content: str | None, text: str) -> None:
    if content is not None:
        (tmp_path / "config.json").write_text(content)
    with pytest.raises(InputError, match=text):
        read_config(tmp_path)


def test_a_folder_that_is_not_there_is_named(tmp_path: Path) -> None:
    with pytest.raises(InputError, match=r"^command line: HF_DIR: .*absent: no such folder; of a model on the hub"):
        read_config(tmp_path / "absent")


def test_equal_tensors_are_told_in_pieces(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(source, "COMPARED_ELEMENTS", 4)
    right = torch.tensor([float("nan"), *range(9)])
    other = right.clone()
    other[9] = 8.5
    tensors: dict[str, Any] = {"a": right, "b": right.clone(), "c": other, "d": right[:9].clone(), "e": right.half()}
    save_file(tensors, tmp_path / "model.safetensors")
    found = read_tensors(tmp_path, {})
    equal: Callable[[str], bool] = lambda name: are_equal(found["a"], found[name])  # noqa: E731
    assert [name for name in tensors if equal(name)] == ["a", "b"]
