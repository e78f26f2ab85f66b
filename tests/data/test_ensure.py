from __future__ import annotations

import fcntl
import pickle
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path

import psutil
import pytest

from bigtrain.config.schema import Recipe
from bigtrain.data import ensure
from bigtrain.data.corpus import Corpus, corpus_folder
from bigtrain.data.ensure import ensure_prepared
from bigtrain.errors import BigtrainError, DataError

MakeRecipe = Callable[..., Recipe]
HEAVY = "{'torch', 'datasets', 'tokenizers', 'pyarrow'} & set(sys.modules)"
CODE = (
    "import pathlib, pickle, sys; from bigtrain.data import ensure_prepared\n"
    "recipe = pickle.loads(pathlib.Path(sys.argv[1]).read_bytes())\n"
    f"print('documents', ensure_prepared(recipe).counts('train').documents, *{HEAVY})"
)


def command(recipe: Recipe, tmp_path: Path) -> list[str]:
    (tmp_path / "recipe").write_bytes(pickle.dumps(recipe))
    return [sys.executable, "-c", CODE, str(tmp_path / "recipe")]


def test_prepared_in_a_child(make_recipe: MakeRecipe, tmp_path: Path) -> None:
    recipe = make_recipe("gpt", cache=str(tmp_path / "cache"))
    done = subprocess.run(command(recipe, tmp_path), capture_output=True, text=True, check=True)
    lines = done.stdout.splitlines()
    assert lines[0] == "training a tokenizer of 400 tokens"
    assert lines[1].startswith("tokenized 600 documents")
    word, count, *heavy = lines[2].split()
    assert (word, heavy) == ("documents", [])
    assert 400 < int(count) < 600
    assert done.stderr == ""


def test_progress_goes_aside(make_recipe: MakeRecipe, tmp_path: Path, capfd: pytest.CaptureFixture[str]) -> None:
    ensure_prepared(make_recipe("gpt", cache=str(tmp_path / "cache")), aside=True)
    told = capfd.readouterr()
    assert told.out == ""
    assert "tokenized" in told.err


def test_no_child_where_it_is_done(
    make_recipe: MakeRecipe, bert_corpus: Corpus, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(subprocess, "Popen", lambda *_, **__: pytest.fail("started a child"))
    assert ensure_prepared(make_recipe("bert")).folder == bert_corpus.folder


def test_faults_come_back_whole_and_print_nothing(
    make_recipe: MakeRecipe, tmp_path: Path, capfd: pytest.CaptureFixture[str]
) -> None:
    path = tmp_path / "a.jsonl"
    path.write_text('{"text": "a"}\n{"text": "b"}\nnonsense\n')
    with pytest.raises(DataError) as raised:
        ensure_prepared(make_recipe("gpt", source=str(path), cache=str(tmp_path / "cache")))
    (fault,) = raised.value.faults
    assert (fault.where, fault.key) == (f"{path}:3", "data.source")
    assert fault.text.startswith("broken JSON")
    assert capfd.readouterr().err == ""


def test_faults_of_paths_need_no_child(make_recipe: MakeRecipe, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(subprocess, "Popen", lambda *_, **__: pytest.fail("started a child"))
    with pytest.raises(DataError, match=r"recipe\.yaml:6: data\.source: no such file or folder: no/such/folder"):
        ensure_prepared(make_recipe("gpt", source="no/such/folder"))


def test_offline_hub(make_recipe: MakeRecipe, tmp_path: Path) -> None:
    with pytest.raises(
        DataError, match=r"^recipe\.yaml:6: data\.source: 'user/set' is no file.*data\.source: embedded"
    ):
        ensure_prepared(make_recipe("gpt", source="user/set", cache=str(tmp_path)))


def test_a_child_that_fails_otherwise(make_recipe: MakeRecipe, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(sys, "executable", "/bin/false")
    with pytest.raises(BigtrainError, match="preparing the data ended with exit code 1"):
        ensure_prepared(make_recipe("gpt", cache=str(tmp_path)))


def test_the_child_ends_with_its_parent(make_recipe: MakeRecipe, tmp_path: Path) -> None:
    recipe = make_recipe("gpt", cache=str(tmp_path / "cache"))
    lock = corpus_folder(recipe).with_suffix(".lock")
    lock.parent.mkdir(parents=True)
    with lock.open("ab") as held:
        fcntl.flock(held, fcntl.LOCK_EX)  # the child waits here
        parent = subprocess.Popen(command(recipe, tmp_path))
        children: list[psutil.Process] = []
        while not children:
            children = psutil.Process(parent.pid).children()
        parent.kill()
        parent.wait()
        gone, alive = psutil.wait_procs(children, timeout=20)
    assert gone
    assert not alive


def test_the_child_takes_this_package_and_nothing_of_the_current_folder(
    make_recipe: MakeRecipe, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    (tmp_path / "tokenizers").mkdir()
    (tmp_path / "tokenizers" / "__init__.py").write_text("raise SystemExit('the wrong one')")
    monkeypatch.chdir(tmp_path)
    corpus = ensure_prepared(make_recipe("gpt", cache=str(tmp_path / "cache")))
    assert corpus.counts("train").documents > 400
    assert (ensure.PACKAGE_PARENT / "bigtrain" / "errors.py").is_file()
