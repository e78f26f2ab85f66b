from __future__ import annotations

import pickle
import shutil
import signal
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from bigtrain.config.schema import Recipe
from bigtrain.data import build, sources
from bigtrain.data.build import prepare
from bigtrain.data.corpus import SPLITS, Corpus, corpus_folder
from bigtrain.data.packing import ROWS_VERSION
from bigtrain.errors import DataError

MakeRecipe = Callable[..., Recipe]
SHARD_TOKENS, BATCH_CHARACTERS = 3000, 2000

CHILD = f"""
import os, pathlib, pickle, signal, sys
from bigtrain.data import build, part
build.SHARD_TOKENS, build.BATCH_CHARACTERS = {SHARD_TOKENS}, {BATCH_CHARACTERS}
owner, name, left = {{
    "batch": (part.PartWriter, "add"), "part": (build, "_finish"), "state": (build, "write_json"),
    "manifest": (build, "_manifest"), "rename": (pathlib.Path, "rename"), "tokenizer": (build, "_resumed"),
}}[sys.argv[2]] + (int(sys.argv[3]),)
whole = getattr(owner, name)
def killed(*arguments):
    global left
    left -= 1
    if left < 0:
        os.kill(os.getpid(), signal.SIGKILL)
    return whole(*arguments)
setattr(owner, name, killed)
build.prepare(pickle.loads(pathlib.Path(sys.argv[1]).read_bytes()), show_progress=False)
"""


@pytest.fixture
def small(monkeypatch: pytest.MonkeyPatch) -> None:
    """Let the small text give several parts of several batches."""
    monkeypatch.setattr(build, "SHARD_TOKENS", SHARD_TOKENS)
    monkeypatch.setattr(build, "BATCH_CHARACTERS", BATCH_CHARACTERS)


@pytest.fixture(scope="module")
def whole(make_recipe: MakeRecipe, tmp_path_factory: pytest.TempPathFactory) -> dict[str, bytes]:
    """The files of a corpus that was made without interruption."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(build, "SHARD_TOKENS", SHARD_TOKENS)
        patch.setattr(build, "BATCH_CHARACTERS", BATCH_CHARACTERS)
        recipe = make_recipe("gpt", cache=str(tmp_path_factory.mktemp("whole")))
        return contents(prepare(recipe, show_progress=False).folder)


def contents(folder: Path) -> dict[str, bytes]:
    return {file.relative_to(folder).as_posix(): file.read_bytes() for file in folder.rglob("*") if file.is_file()}


def kill(recipe: Recipe, place: str, count: int, tmp_path: Path) -> None:
    (tmp_path / "recipe").write_bytes(pickle.dumps(recipe))
    done = subprocess.run([sys.executable, "-c", CHILD, str(tmp_path / "recipe"), place, str(count)], check=False)
    assert done.returncode == -signal.SIGKILL


def test_several_parts_hold_all(whole: dict[str, bytes], gpt_corpus: Corpus) -> None:
    assert {f"{split}-0000{part}.tokens" for split in SPLITS for part in range(3)} <= set(whole)
    for split in SPLITS:
        names = sorted(name for name in whole if name.startswith(split) and name.endswith(".tokens"))
        assert b"".join(whole[name] for name in names) == (gpt_corpus.folder / f"{split}-00000.tokens").read_bytes()


@pytest.mark.parametrize(
    ("place", "count"),
    [
        ("tokenizer", 0),
        ("batch", 0),
        ("batch", 7),
        ("part", 1),
        ("state", 1),
        ("part", 3),
        ("manifest", 0),
        ("rename", 0),
    ],
)
def test_killed_anywhere_the_files_are_the_same(
    make_recipe: MakeRecipe, tmp_path: Path, small: None, whole: dict[str, bytes], place: str, count: int
) -> None:
    recipe = make_recipe("gpt", cache=str(tmp_path / "cache"))
    kill(recipe, place, count, tmp_path)
    assert not corpus_folder(recipe).exists()
    assert contents(prepare(recipe, show_progress=False).folder) == whole


def test_goes_on_after_the_last_finished_part(
    make_recipe: MakeRecipe, tmp_path: Path, small: None, monkeypatch: pytest.MonkeyPatch
) -> None:
    recipe = make_recipe("gpt", cache=str(tmp_path / "cache"))
    kill(recipe, "part", 2, tmp_path)
    encoded: list[str] = []
    original = build._encoded

    def spy(tokenizer: Any, batches: Any) -> Any:
        for texts, encodings in original(tokenizer, batches):
            encoded.extend(texts)
            yield texts, encodings

    monkeypatch.setattr(build, "_encoded", spy)
    prepare(recipe, show_progress=False)
    every = list(sources.documents(recipe.data))
    assert 0 < len(encoded) < len(every) * 0.9
    assert encoded == every[-len(encoded) :]


def test_a_damaged_part_is_made_again(
    make_recipe: MakeRecipe, tmp_path: Path, small: None, whole: dict[str, bytes]
) -> None:
    recipe = make_recipe("gpt", cache=str(tmp_path / "cache"))
    kill(recipe, "part", 2, tmp_path)
    part = corpus_folder(recipe).with_suffix(".partial") / "train-00000.tokens"
    part.write_bytes(b"xx" + part.read_bytes()[2:])
    assert contents(prepare(recipe, show_progress=False).folder) == whole


def test_what_a_killed_process_left_aside_is_cleared(
    make_recipe: MakeRecipe, tmp_path: Path, small: None, whole: dict[str, bytes]
) -> None:
    recipe = make_recipe("gpt", cache=str(tmp_path / "cache"))
    aside = corpus_folder(recipe).with_suffix(".partial")
    aside.mkdir(parents=True)
    (aside / "manifest.json.77.aside").write_text("{")
    assert contents(prepare(recipe, show_progress=False).folder) == whole


def test_prepared_once(make_recipe: MakeRecipe, bert_corpus: Corpus, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(build, "_tokenize", lambda *_: pytest.fail("tokenized again"))
    assert prepare(make_recipe("bert"), show_progress=False).folder == bert_corpus.folder
    assert prepare(make_recipe("bert", sequence_length=48), show_progress=False).folder == bert_corpus.folder
    assert (bert_corpus.folder / "rows" / f"train-48-packed-{ROWS_VERSION}").is_dir()


def test_two_at_once_make_one(make_recipe: MakeRecipe, tmp_path: Path) -> None:
    recipe = make_recipe("gpt", cache=str(tmp_path / "cache"))
    (tmp_path / "recipe").write_bytes(pickle.dumps(recipe))
    code = (
        "import pathlib, pickle, sys; from bigtrain.data import prepare\n"
        "prepare(pickle.loads(pathlib.Path(sys.argv[1]).read_bytes()))"
    )
    command = [sys.executable, "-c", code, str(tmp_path / "recipe")]
    both = [subprocess.Popen(command, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True) for _ in range(2)]
    outputs = [process.communicate() for process in both]
    assert [process.returncode for process in both] == [0, 0]
    assert [errors for _, errors in outputs] == ["", ""]
    said = "".join(text for text, _ in outputs).splitlines()
    assert [line.split(" ")[0] for line in said] == ["training", "tokenized"]


def test_says_what_it_did(make_recipe: MakeRecipe, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    prepare(make_recipe("gpt", cache=str(tmp_path)))
    lines = capsys.readouterr().out.splitlines()
    assert lines[0] == "training a tokenizer of 400 tokens"
    assert lines[1].startswith("tokenized 600 documents into ")


@pytest.mark.parametrize(
    ("name", "content", "fault"),
    [
        (
            "one.txt",
            "a single document",
            "recipe.yaml:6: data.source: two documents are needed, one of them to evaluate",
        ),
        ("bad.jsonl", '{"text": "a"}\n' * 50 + "{", "bad.jsonl:51: data.source: broken JSON"),
        ("bad.txt", "fine\n\n" * 50 + "\udcff", "bad.txt: data.source: not UTF-8 text: byte 0xff at offset 300"),
        ("bad.csv", "body\nx\n", "bad.csv:1: data.text_column: no column 'text'; there are: body"),
        ("none.txt", "", "none.txt: data.source: the file is empty"),
    ],
)
def test_faults_of_the_source(make_recipe: MakeRecipe, tmp_path: Path, name: str, content: str, fault: str) -> None:
    path = tmp_path / name
    path.write_text(content, errors="surrogateescape")
    recipe = make_recipe("gpt", source=str(path), cache=str(tmp_path / "cache"))
    with pytest.raises(DataError) as raised:
        prepare(recipe, show_progress=False)
    assert str(raised.value).replace(f"{tmp_path}/", "").startswith(fault)
    assert not [path for path in (tmp_path / "cache").glob("corpora/*") if path.is_dir()]


def test_a_mended_source_is_prepared(make_recipe: MakeRecipe, tmp_path: Path) -> None:
    path = tmp_path / "a.jsonl"
    path.write_text('{"text": "one fox"}\n' * 30 + "{")
    recipe = make_recipe("gpt", source=str(path), cache=str(tmp_path / "cache"))
    with pytest.raises(DataError):
        prepare(recipe, show_progress=False)
    path.write_text('{"text": "one fox"}\n' * 30)
    corpus = prepare(recipe, show_progress=False)
    assert sum(corpus.counts(split).documents for split in SPLITS) == 30


def test_files_that_change_meanwhile(make_recipe: MakeRecipe, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    path = tmp_path / "a.txt"
    path.write_text("one\n\ntwo\n\nthree")
    recipe = make_recipe("gpt", source=str(path), cache=str(tmp_path / "cache"))
    write_parts = build._write_parts

    def changing(*arguments: Any) -> None:
        write_parts(*arguments)
        path.write_text("another text altogether\n\nof another size")

    monkeypatch.setattr(build, "_write_parts", changing)
    with pytest.raises(
        DataError, match="recipe.yaml:6: data.source: the files changed while they were read; run again"
    ):
        prepare(recipe, show_progress=False)
    assert not list((tmp_path / "cache" / "corpora").glob("*.partial"))


def test_documents_without_tokens_are_not_kept(make_recipe: MakeRecipe, tmp_path: Path) -> None:
    path = tmp_path / "a.jsonl"
    path.write_text('{"text": "\\u0001"}\n' + '{"text": "some words"}\n' * 8)
    recipe = make_recipe("bert", source=str(path), cache=str(tmp_path / "cache"))
    corpus = prepare(recipe, show_progress=False)
    assert sum(corpus.counts(split).documents for split in SPLITS) == 8
    assert corpus.counts("validation").documents >= 1


def test_a_loaded_tokenizer_gives_the_same_tokens(make_recipe: MakeRecipe, bert_corpus: Corpus, tmp_path: Path) -> None:
    shutil.copy(bert_corpus.tokenizer_file, tmp_path / "tokenizer.json")
    loaded = prepare(make_recipe("bert", tokenizer=str(tmp_path), cache=str(tmp_path / "cache")), show_progress=False)
    for name in ("train-00000.tokens", "validation-00000.offsets", "unigram_counts.npy", "tokenizer.json"):
        assert (loaded.folder / name).read_bytes() == (bert_corpus.folder / name).read_bytes()
