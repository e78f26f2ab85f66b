"""A tokenizer in place of a run's: it may only add tokens."""

from __future__ import annotations

from pathlib import Path

import pytest
from enlarged import ADDED, enlarged
from tokenizers import Tokenizer

from bigtrain.data.tokenizer import train_tokenizer
from bigtrain.errors import InputError
from bigtrain.extension.tokenizers import larger_tokenizer


@pytest.fixture(scope="module")
def own(tmp_path_factory: pytest.TempPathFactory) -> Path:
    file = tmp_path_factory.mktemp("own") / "tokenizer.json"
    texts = ["the red bird sings slowly, and the green river falls again over stones and trees"] * 9
    file.write_text(train_tokenizer(texts, "gpt", 300, False).to_str(pretty=True))
    return file


def test_what_it_adds_is_counted_in_a_file_or_a_folder(own: Path, tmp_path: Path) -> None:
    file = enlarged(own, tmp_path / "tokenizer.json")
    found = larger_tokenizer(str(file), own)
    assert (found.ids, found.added) == (300 + ADDED, ADDED)
    assert larger_tokenizer(str(tmp_path), own) == found
    kept = Tokenizer.from_str(found.text)
    assert kept.encode("new7", add_special_tokens=False).ids == [307]


@pytest.mark.parametrize(
    ("damage", "text"),
    [
        ("shrinks", "new.json: the vocabulary would shrink: 2 of the 300 tokens of .* are not in it, such as '.*', '"),
        ("swaps", r"new.json: 2 tokens have other ids than in .*: '.*' is 271 and was 270, '.*' is 270 and was 271; "),
        ("nothing", "new.json: has no token that .*tokenizer.json lacks"),
        ("end", "'</s>' would be its eos token in place of '<|endoftext|>'"),
        ("absent", "no such file or folder: .*new.json"),
        ("no tokenizer", "new.json: --tokenizer: the file is no tokenizer.json"),
    ],
)
def test_one_that_does_not_only_add_is_refused_in_a_line(own: Path, tmp_path: Path, damage: str, text: str) -> None:
    place = enlarged(own, tmp_path / "new.json", damage)
    with pytest.raises(InputError, match=text) as refused:
        larger_tokenizer(str(place), own)
    assert str(refused.value).startswith(("command line: --tokenizer: ", f"{place}: --tokenizer: "))
    assert len(str(refused.value).splitlines()) == 1


def test_a_hub_id_that_is_not_there_is_refused(own: Path) -> None:
    with pytest.raises(InputError, match="^command line: --tokenizer: 'nobody/nothing' is no file or folder here"):
        larger_tokenizer("nobody/nothing", own)
