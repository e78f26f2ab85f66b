from __future__ import annotations

import json
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest

from bigtrain.data.vocabulary import SpecialTokens, read_tokenizer_json, tokenizer_path, vocabulary_size
from bigtrain.errors import DataError

ORIGIN = "recipe.yaml:7"


def write(path: Path, vocabulary: Any, added: Any = ()) -> Path:
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text(json.dumps({"model": {"vocab": vocabulary}, "added_tokens": [{"id": token} for token in added]}))
    return path


@pytest.mark.parametrize(
    ("names", "expected"),
    [
        (["[PAD]", "[UNK]", "[CLS]", "[SEP]", "[MASK]", "a"], SpecialTokens(pad=0, unk=1, bos=2, eos=3, mask=4)),
        (["<s>", "<pad>", "</s>", "<unk>", "<mask>"], SpecialTokens(bos=0, pad=1, eos=2, unk=3, mask=4)),
        (["!", "<|endoftext|>"], SpecialTokens(eos=1)),
        (["<unk>", "<s>", "</s>"], SpecialTokens(unk=0, bos=1, eos=2)),
        (["<|begin_of_text|>", "<|end_of_text|>"], SpecialTokens(bos=0, eos=1)),
        (["a", "b"], SpecialTokens()),
    ],
    ids=["bert", "roberta", "gpt2", "llama2", "llama3", "none"],
)
def test_special_tokens_by_their_usual_names(names: list[str], expected: SpecialTokens) -> None:
    assert SpecialTokens.of({name: number for number, name in enumerate(names)}) == expected


def test_ids_and_filler() -> None:
    assert SpecialTokens(pad=0, eos=3, mask=4).ids == {0, 3, 4}
    assert SpecialTokens().ids == frozenset()
    assert SpecialTokens(pad=0, eos=3).filler == 0
    assert SpecialTokens(eos=3).filler == 3
    assert SpecialTokens().filler == 0


def test_path_of_a_file_a_folder_and_a_hub_id(tmp_path: Path) -> None:
    path = write(tmp_path / "folder" / "tokenizer.json", {"a": 0})
    assert tokenizer_path(str(path)) == tokenizer_path(str(path.parent)) == path
    assert tokenizer_path("user/model") is None


@pytest.mark.parametrize("spec", ["no/such/tokenizer", "./absent", "absent.json"])
def test_absent(spec: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    with pytest.raises(DataError) as raised:
        vocabulary_size(spec, ORIGIN)
    remedy = "name a tokenizer.json, or a folder that has one"
    assert str(raised.value) == f"{ORIGIN}: data.tokenizer: no such file or folder: {spec}; {remedy}"


def test_folder_without_one(tmp_path: Path) -> None:
    with pytest.raises(DataError, match=f"^{ORIGIN}: data.tokenizer: no tokenizer.json in {tmp_path}; name a folder"):
        vocabulary_size(str(tmp_path), ORIGIN)


@pytest.mark.parametrize(
    ("vocabulary", "added", "expected"),
    [
        ({"a": 0, "b": 1}, (), 2),
        ({"a": 0, "b": 9}, (), 10),
        ({"a": 0}, (1, 2), 3),
        ([["a", -1.0], ["b", -2.0]], (0,), 2),
        ({}, (), 0),
    ],
)
def test_size_is_one_more_than_the_largest_id(tmp_path: Path, vocabulary: Any, added: Any, expected: int) -> None:
    assert vocabulary_size(str(write(tmp_path / "t.json", vocabulary, added))) == expected


def test_size_of_a_hub_id_that_is_not_cached() -> None:
    assert vocabulary_size("user/model") is None


@pytest.mark.parametrize("content", [b"", b"not JSON", b"[1]", b"{}", b'{"model": 3}', b"\xff\xfe", b"[" * 100_000])
def test_no_tokenizer(tmp_path: Path, content: bytes) -> None:
    path = tmp_path / "t.json"
    path.write_bytes(content)
    with pytest.raises(DataError) as raised:
        read_tokenizer_json(path)
    what = "the file is no tokenizer.json of the tokenizers library; name one, or write 'train'"
    assert str(raised.value) == f"{path}: data.tokenizer: {what}"


@pytest.mark.parametrize(
    "vocabulary", [{"a": "b"}, {"a": True}, {"a": -1}, {"a": 2**32}, 3, "a", None, [1, 2], [["a"]]]
)
def test_vocabularies_of_another_shape(tmp_path: Path, vocabulary: Any) -> None:
    with pytest.raises(DataError, match=r"no tokenizer.json"):
        vocabulary_size(str(write(tmp_path / "t.json", vocabulary)))


@pytest.mark.parametrize("added", [3, "a", {"id": 1}, [1], [{}], [{"id": None}], [{"id": 1.5}]])
def test_added_tokens_of_another_shape(tmp_path: Path, added: Any) -> None:
    path = tmp_path / "t.json"
    path.write_text(json.dumps({"model": {"vocab": {"a": 0}}, "added_tokens": added}))
    with pytest.raises(DataError) as raised:
        vocabulary_size(str(path))
    what = "the file is no tokenizer.json of the tokenizers library; name one, or write 'train'"
    assert str(raised.value) == f"{path}: data.tokenizer: {what}"


def test_needs_neither_tokenizers_nor_torch(tmp_path: Path) -> None:
    path = write(tmp_path / "t.json", {"a": 0})
    code = (
        "import sys; from bigtrain.data import vocabulary_size; print(vocabulary_size(sys.argv[1]), "
        "*{'torch', 'tokenizers', 'datasets', 'pyarrow', 'huggingface_hub'} & set(sys.modules))"
    )
    done = subprocess.run([sys.executable, "-c", code, str(path)], capture_output=True, text=True, check=True)
    assert done.stdout.split() == ["1"]
