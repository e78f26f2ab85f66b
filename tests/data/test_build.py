from __future__ import annotations

import json
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
from bigtrain.data import batches, build, hub, sources
from bigtrain.data.build import prepare
from bigtrain.data.corpus import SPLITS, Corpus, corpus_folder
from bigtrain.data.packing import ROWS_VERSION
from bigtrain.errors import DataError

MakeRecipe = Callable[..., Recipe]
SHARD_TOKENS, BATCH_CHARACTERS = 3000, 2000

CHILD = f"""
import os, pathlib, pickle, signal, sys
import datasets
from bigtrain.data import batches, build, hub, part, unfinished
build.SHARD_TOKENS, batches.BATCH_CHARACTERS = {SHARD_TOKENS}, {BATCH_CHARACTERS}
if folder := sys.argv[4]:
    hub.reachable, load = lambda: True, datasets.load_dataset
    datasets.load_dataset = lambda name, *rest, **keys: load(folder, *rest, **keys)
owner, name, left = {{
    "batch": (part.PartWriter, "add"), "part": (build, "finish"), "state": (unfinished, "write_json"),
    "manifest": (build, "_manifest"), "rename": (pathlib.Path, "rename"), "tokenizer": (build, "resumed"),
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
    monkeypatch.setattr(batches, "BATCH_CHARACTERS", BATCH_CHARACTERS)


@pytest.fixture(scope="module")
def whole(make_recipe: MakeRecipe, tmp_path_factory: pytest.TempPathFactory) -> dict[str, bytes]:
    """The files of a corpus that was made without interruption."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(build, "SHARD_TOKENS", SHARD_TOKENS)
        patch.setattr(batches, "BATCH_CHARACTERS", BATCH_CHARACTERS)
        recipe = make_recipe("gpt", cache=str(tmp_path_factory.mktemp("whole")))
        return contents(prepare(recipe, show_progress=False).folder)


def contents(folder: Path) -> dict[str, bytes]:
    return {file.relative_to(folder).as_posix(): file.read_bytes() for file in folder.rglob("*") if file.is_file()}


def kill(recipe: Recipe, place: str, count: int, tmp_path: Path, hub_folder: str = "") -> None:
    """Prepare in a process that is killed after `count` calls of a place; the hub is a folder, if one is named."""
    (tmp_path / "recipe").write_bytes(pickle.dumps(recipe))
    arguments = [str(tmp_path / "recipe"), place, str(count), hub_folder]
    done = subprocess.run([sys.executable, "-c", CHILD, *arguments], check=False)
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
        for batch, encodings in original(tokenizer, batches):
            encoded.extend(batch.texts)
            yield batch, encodings

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


@pytest.fixture
def hub_folder(tmp_path: Path, story: Callable[..., list[str]], monkeypatch: pytest.MonkeyPatch) -> Path:
    """A folder that answers for every hub id: three files, some of whose texts are short, repeated, or no words."""
    import datasets

    folder, texts = tmp_path / "hub", story(500)
    folder.mkdir()
    for number, wanted in enumerate((texts[:200], texts[150:350], [*texts[350:], "1234 5678 9 !", "x"])):
        (folder / f"train-{number}.jsonl").write_text("".join(f"{json.dumps({'text': text})}\n" for text in wanted))
    load = datasets.load_dataset
    monkeypatch.setattr(hub, "reachable", lambda: True)
    monkeypatch.setattr(datasets, "load_dataset", lambda name, *rest, **keys: load(str(folder), *rest, **keys))
    return folder


def test_a_killed_stream_goes_on_at_its_row(
    make_recipe: MakeRecipe, tmp_path: Path, small: None, hub_folder: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def recipe(cache: str) -> Recipe:
        keys = {"streaming": True, "deduplicate": True, "min_letters": 0.1, "min_characters": 4, "max_tokens": 14_000}
        return make_recipe("gpt", source="user/set", cache=str(tmp_path / cache), **keys)

    whole = prepare(recipe("whole"), show_progress=False)
    kill(recipe("killed"), "part", 3, tmp_path, str(hub_folder))
    passed: list[int] = []
    rows = hub.HubRows.__iter__

    def counted(stream: hub.HubRows) -> Any:
        passed.append(stream.rows)
        return rows(stream)

    monkeypatch.setattr(hub.HubRows, "__iter__", counted)
    resumed = prepare(recipe("killed"), show_progress=False)
    assert contents(resumed.folder) == contents(whole.folder)
    assert passed[-1] > 0, "the stream was read from its start"
    assert whole.left_out["duplicate"] == 50
    tokens = sum(whole.counts(split).tokens for split in SPLITS)
    assert 14_000 <= tokens < 14_000 + max(map(len, whole.documents("train")))


def test_what_is_left_out(
    make_recipe: MakeRecipe, tmp_path: Path, hub_folder: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    keys = {"deduplicate": True, "min_letters": 0.1, "min_characters": 4, "cache": str(tmp_path / "cache")}
    corpus = prepare(make_recipe("gpt", source="user/set", streaming=True, **keys))
    assert corpus.left_out == {"filtered": 2, "duplicate": 50}
    assert sum(corpus.counts(split).documents for split in SPLITS) == 500
    said = capsys.readouterr().out.splitlines()
    assert "reading the whole stream; data.max_tokens=9103 stops where this run has read enough" in said
    assert said[-1] == "left out: 2 documents by the filter, 50 as duplicates"
    assert not list(corpus.folder.glob("*.seen")) and not (corpus.folder / "progress.json").exists()
    plain = prepare(make_recipe("gpt", source=str(hub_folder), cache=str(tmp_path / "cache")), show_progress=False)
    assert sum(plain.counts(split).documents for split in SPLITS) == 552
    assert plain.left_out == {"filtered": 0, "duplicate": 0}


def test_a_stream_that_breaks_off_is_kept(
    make_recipe: MakeRecipe, tmp_path: Path, small: None, hub_folder: Path
) -> None:
    recipe = make_recipe("gpt", source="user/set", streaming=True, cache=str(tmp_path / "cache"))
    whole = (hub_folder / "train-2.jsonl").read_text()
    (hub_folder / "train-2.jsonl").write_text(whole[:-5])
    with pytest.raises(DataError, match=r"reading 'user/set' broke off after row \d+: .*; run again to go on"):
        prepare(recipe, show_progress=False)
    (hub_folder / "train-2.jsonl").write_text(whole)
    corpus = prepare(recipe, show_progress=False)
    again = make_recipe("gpt", source="user/set", streaming=True, cache=str(tmp_path / "again"))
    assert contents(corpus.folder) == contents(prepare(again, show_progress=False).folder)


def test_nothing_left_by_the_filter(make_recipe: MakeRecipe, tmp_path: Path) -> None:
    (tmp_path / "a.txt").write_text("some words\n\nother words\n\n77\n\n88")
    recipe = make_recipe("gpt", source=str(tmp_path / "a.txt"), cache=str(tmp_path / "cache"), min_characters=11)
    with pytest.raises(DataError, match="two documents are needed, .*; left out: 3 documents by the filter, 0 as dup"):
        prepare(recipe, show_progress=False)
