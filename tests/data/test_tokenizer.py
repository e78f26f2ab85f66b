from __future__ import annotations

import json
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path

import pytest
from tokenizers import Tokenizer

from bigtrain.data import tokenizer as module
from bigtrain.data.tokenizer import (
    BERT_SPECIAL_TOKENS,
    END_OF_TEXT,
    id_count,
    load_tokenizer,
    open_tokenizer,
    sample_characters,
    special_tokens,
    train_tokenizer,
)
from bigtrain.data.vocabulary import SpecialTokens, vocabulary_size
from bigtrain.errors import DataError

Story = Callable[[int], list[str]]
ORIGIN = "recipe.yaml:9"


@pytest.fixture(scope="module")
def bert(story: Story) -> Tokenizer:
    return train_tokenizer(story(200), "bert", 300, lowercase=True)


@pytest.fixture(scope="module")
def gpt(story: Story) -> Tokenizer:
    return train_tokenizer(story(200), "gpt", 300, lowercase=False)


def ids(tokenizer: Tokenizer) -> list[int]:
    return sorted(tokenizer.get_vocab().values())


def test_exactly_the_size_that_was_asked_for(bert: Tokenizer, gpt: Tokenizer) -> None:
    assert ids(bert) == ids(gpt) == list(range(300))
    assert id_count(bert) == 300


@pytest.mark.parametrize("family", ["bert", "gpt"])
def test_unused_tokens_fill_it_up(family: str, tmp_path: Path) -> None:
    trained = train_tokenizer(["a few words [unused0]"], family, 600, lowercase=False)  # type: ignore[arg-type]
    assert ids(trained) == list(range(600))
    assert {"[unused1]", "[unused100]"} <= set(trained.get_vocab())
    assert trained.encode("a few words", add_special_tokens=False).ids
    trained.save(str(tmp_path / "tokenizer.json"))
    assert vocabulary_size(str(tmp_path)) == 600


def test_special_tokens(bert: Tokenizer, gpt: Tokenizer) -> None:
    assert special_tokens(bert) == SpecialTokens(pad=0, unk=1, bos=2, eos=3, mask=4)
    assert special_tokens(gpt) == SpecialTokens(eos=0)
    assert bert.encode("a fox").tokens[0] == "[CLS]"
    assert bert.encode("a fox", "a dog").type_ids[-1] == 1
    assert gpt.id_to_token(0) == END_OF_TEXT


def test_wordpiece_spells_and_folds(bert: Tokenizer) -> None:
    assert bert.encode("The FOX.", add_special_tokens=False).tokens == ["the", "fox", "."]
    assert bert.encode("x\u00c9o", add_special_tokens=False).tokens == ["x", "##e", "##o"]
    assert bert.decode(bert.encode("a fox runs.").ids) == "a fox runs."
    assert bert.encode("\u4e00", add_special_tokens=False).tokens == ["[UNK]"]


def test_case_is_kept_unless_asked(story: Story) -> None:
    kept = train_tokenizer([*story(50), "The A"], "bert", 200, lowercase=False)
    assert "T" in kept.get_vocab()
    folded = train_tokenizer(["\u00c9A"], "gpt", 300, lowercase=True)
    assert folded.decode(folded.encode("\u00c9A").ids) == "ea"


def test_bytes_give_back_any_text(gpt: Tokenizer) -> None:
    for text in ("The fox.", " two  spaces\n\ttab", "\u00e9\u4e00\U0001f600", "\x00"):
        assert gpt.decode(gpt.encode(text).ids) == text


@pytest.mark.parametrize(("family", "needed"), [("bert", 5 + 2 * 3), ("gpt", 257), ("llama", 257)])
def test_too_small_for_the_alphabet(family: str, needed: int) -> None:
    assert train_tokenizer(["abc cba"], family, needed, lowercase=False).get_vocab_size() == needed  # type: ignore[arg-type]
    with pytest.raises(DataError) as raised:
        train_tokenizer(["abc cba"], family, needed - 1, lowercase=False, origin=ORIGIN)  # type: ignore[arg-type]
    expected = f"{needed - 1} tokens are too few to spell this text; at least {needed} are needed"
    assert str(raised.value) == f"{ORIGIN}: data.vocab_size: {expected}"


def test_rare_letters_of_a_large_alphabet_are_unknown(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(module, "LARGEST_ALPHABET", 3)
    trained = train_tokenizer(["aaaa bbb cc d"], "bert", 40, lowercase=False)
    assert {"a", "b", "c"} <= set(trained.get_vocab())
    assert trained.encode("d", add_special_tokens=False).tokens == ["[UNK]"]


@pytest.mark.parametrize("family", ["bert", "gpt"])
def test_the_same_in_every_process(family: str, story: Story, tmp_path: Path) -> None:
    # Hash tables are seeded anew in each process, and frequencies are tied in a short text.
    code = (
        "import sys, json; from bigtrain.data.tokenizer import train_tokenizer\n"
        "print(train_tokenizer(json.load(sys.stdin), sys.argv[1], 350, False).to_str())"
    )
    text = json.dumps(story(40))
    runs = [
        subprocess.run(
            [sys.executable, "-c", code, family], input=text, capture_output=True, text=True, check=True
        ).stdout
        for _ in range(3)
    ]
    assert runs[0] == runs[1] == runs[2]


def test_reads_a_bounded_sample(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(module, "SAMPLE_CHARACTERS_PER_TOKEN", 1)
    texts = iter(["x" * 200, "y" * 200, "never"])
    trained = train_tokenizer(texts, "gpt", 300, lowercase=False)
    assert next(texts) == "never"
    assert trained.get_vocab_size() == 300


def test_sample_grows_with_the_vocabulary_up_to_a_bound() -> None:
    assert sample_characters(8192) == 8192 * 512
    assert sample_characters(30522) < 16 * 2**20
    assert sample_characters(10**6) == 16 * 2**20


def test_loading_a_file_and_a_folder(bert: Tokenizer, tmp_path: Path) -> None:
    bert.enable_truncation(4)
    bert.enable_padding(length=16)
    bert.save(str(tmp_path / "tokenizer.json"))
    bert.no_truncation()
    bert.no_padding()
    for spec in (tmp_path, tmp_path / "tokenizer.json"):
        loaded = load_tokenizer(str(spec))
        assert loaded.encode("a fox sees the house", add_special_tokens=False).tokens[-2:] == ["the", "house"]


def test_special_tokens_written_in_a_text_are_text(bert: Tokenizer, gpt: Tokenizer, tmp_path: Path) -> None:
    for number, (tokenizer, text) in enumerate([(bert, "a [SEP] b"), (gpt, f"a{END_OF_TEXT}b")]):
        tokenizer.save(str(tmp_path / f"{number}.json"))
        loaded = open_tokenizer(tmp_path / f"{number}.json")
        special = special_tokens(loaded)
        assert special.eos not in loaded.encode(text, add_special_tokens=False).ids


@pytest.mark.parametrize("content", ["", "{}", '{"model": {"type": "Unheard"}}', '{"version": "1.0", "model": {}}'])
def test_a_file_that_is_no_tokenizer(tmp_path: Path, content: str) -> None:
    path = tmp_path / "tokenizer.json"
    path.write_text(content)
    with pytest.raises(DataError) as raised:
        load_tokenizer(str(path))
    assert (
        str(raised.value)
        == f"{path}: data.tokenizer: the file is no tokenizer.json of the tokenizers library; name one, or write 'train'"  # noqa: E501
    )


def test_hub_id_offline() -> None:
    with pytest.raises(DataError, match="cannot be reached"):
        load_tokenizer("user/model", ORIGIN)


def test_five_special_tokens_come_first(bert: Tokenizer) -> None:
    assert [bert.id_to_token(number) for number in range(5)] == list(BERT_SPECIAL_TOKENS)


@pytest.mark.parametrize(
    "changes",
    [
        {"pre_tokenizer": {"type": "Split", "pattern": {"Regex": "(a+)+$"}, "behavior": "Isolated", "invert": False}},
        {"model": {"type": "BPE", "vocab": {"a": 5}, "merges": [["a", "a"]]}},
        {"model": {"type": "WordLevel", "vocab": {"a": 2**31}, "unk_token": "a"}},
        {"normalizer": {"type": "Precompiled", "precompiled_charsmap": "////"}},
    ],
    ids=["backtracking", "a merge of nothing", "a huge id", "a damaged map"],
)
def test_what_makes_the_library_panic_is_no_tokenizer(
    tmp_path: Path, changes: dict[str, object], capfd: pytest.CaptureFixture[str]
) -> None:
    model = {"type": "WordLevel", "vocab": {"[UNK]": 0, "a": 1}, "unk_token": "[UNK]"}
    path = tmp_path / "tokenizer.json"
    path.write_text(json.dumps({"version": "1.0", "added_tokens": [], "model": model, **changes}))
    with pytest.raises(DataError, match="no tokenizer.json"):
        load_tokenizer(str(path))
    assert capfd.readouterr().err == ""
