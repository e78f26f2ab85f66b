"""Bad input from outside: a line a fault with its place and what to write instead, nothing started, nothing made."""

from __future__ import annotations

import errno
import os
import subprocess
import sys
import time
from pathlib import Path
from typing import Any, NamedTuple

import pyarrow as pa
import pyarrow.parquet as pq
import pytest
from pytest import param

from bigtrain import cli, launcher
from bigtrain.checkpoint import resume
from tests.shared.bad_input import COMMANDS, DATA, GOOD, LINES, OVERRIDES, RECIPES

LIMIT_SECONDS = 3.0
"""What a fault of a recipe may take in processor time: the clock on the wall would measure the other tests, too."""


class Answer(NamedTuple):
    """What a command printed and returned, and the processor time that it took in this process."""

    code: Any
    out: str
    err: str
    seconds: float


class Started(Exception):
    """A worker was to be started."""


@pytest.fixture
def say(monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str], tmp_path: Path) -> Any:
    """Return a function that runs a command in this process, in an empty folder, without its workers."""

    def refuse(*_: object, **__: object) -> None:
        raise Started

    def call(*argv: object) -> Answer:
        monkeypatch.setattr(sys, "argv", ["bigtrain", *map(str, argv)])
        capsys.readouterr()
        begun = time.process_time()
        with pytest.raises((SystemExit, Started)) as ended:
            cli.main()
        seconds = time.process_time() - begun
        code = ended.value.code or 0 if isinstance(ended.value, SystemExit) else "started"
        return Answer(code, *capsys.readouterr(), seconds)

    (tmp_path / "here").mkdir()
    monkeypatch.chdir(tmp_path / "here")
    monkeypatch.setattr(launcher, "keep_running", refuse)
    monkeypatch.setattr(launcher.Workers, "run", refuse)
    return call


def refused(answer: Answer, *words: str) -> str:
    """Return the only line of a refusal, once it is known to be one."""
    assert answer.code == 2, answer
    (line,) = answer.err.splitlines()
    assert line.startswith("error: ") and line.isprintable(), line
    assert all(word in line for word in words), line
    assert not Path("runs").exists() and not Path("run").exists()
    return line


@pytest.mark.parametrize("override", OVERRIDES)
def test_overrides(say: Any, override: str) -> None:
    answer = say("launch", "quickstart_bert", "train.device=cpu", override, "--run-dir", "run")
    line = refused(answer, OVERRIDES[override])
    assert line.startswith("error: command line: ")
    assert answer.seconds < LIMIT_SECONDS


def test_a_schedule_that_does_not_fit(say: Any) -> None:
    wsd = ("train.device=cpu", "optimizer.schedule=wsd")
    refused(say("plan", "quickstart_bert", *wsd, "optimizer.warmup_steps=81%"), "use at most 80%")
    refused(say("plan", "quickstart_bert", *wsd, "optimizer.warmup_steps=1041"), "use at most 1040")
    assert say("plan", "quickstart_bert", *wsd, "optimizer.warmup_steps=1040").code == 0


@pytest.mark.parametrize("what", RECIPES)
def test_recipe_files(say: Any, what: str) -> None:
    content, words = RECIPES[what]
    Path("r.yaml").write_bytes(content if isinstance(content, bytes) else content.encode())
    answer = say("launch", "r.yaml", "train.device=cpu", "--run-dir", "run")
    if what == "two documents":  # and what it lacks
        assert answer.code == 2 and "r.yaml:2: a second document starts here; a recipe is one document" in answer.err
        return
    assert refused(answer, words).startswith("error: r.yaml")
    assert answer.seconds < LIMIT_SECONDS


@pytest.mark.parametrize(
    "content",
    [
        param(b"\xef\xbb\xbf" + GOOD.encode(), id="BOM"),
        param(GOOD.replace("\n", "\r\n").encode(), id="CRLF"),
        param(b"\xef\xbb\xbf" + GOOD.replace("\n", "\r\n").encode(), id="both"),
        param(GOOD.replace("\n", "\r").encode(), id="CR"),
    ],
)
def test_files_of_other_editors_are_read(say: Any, content: bytes) -> None:
    Path("r.yaml").write_bytes(content)
    assert say("plan", "r.yaml", "train.device=cpu").code == 0


@pytest.mark.parametrize("argv", COMMANDS)
def test_commands(say: Any, argv: tuple[str, ...]) -> None:
    refused(say(*argv), COMMANDS[argv])


def test_no_command_at_all_is_the_help(say: Any) -> None:
    answer = say()
    assert (answer.code, answer.err) == (2, "")
    assert "launch" in answer.out


def test_a_run_folder_that_cannot_be_written(say: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    def read_only(*_: object, **__: object) -> None:
        raise OSError(errno.EROFS, os.strerror(errno.EROFS))

    monkeypatch.setattr(resume.tempfile, "mkdtemp", read_only)
    answer = say("launch", "quickstart_bert", "train.device=cpu", "--run-dir", "run")
    refused(answer, "command line: --run-dir: run: Read-only file system; name another folder")


@pytest.mark.parametrize("name", DATA)
def test_data_files(say: Any, tiny_recipes: dict[str, Path], name: str) -> None:
    content = DATA[name][0]
    Path(name).write_bytes(content if isinstance(content, bytes) else content.encode())
    refused(say("launch", tiny_recipes["gpt"], f"data.source=./{name}", "--run-dir", "run"), DATA[name][1])


def test_tables(say: Any, tiny_recipes: dict[str, Path]) -> None:
    pq.write_table(pa.table({"text": [1, 2]}), "numbers.parquet")
    numbers = say("launch", tiny_recipes["gpt"], "data.source=numbers.parquet", "--run-dir", "run")
    refused(numbers, "numbers.parquet: data.text_column: column 'text' holds int64, not text; name another one")
    pq.write_table(pa.table({"text": ["red green"] * 2000}), "flipped.parquet")
    content = bytearray(Path("flipped.parquet").read_bytes())
    content[4:40] = bytes(36)
    Path("flipped.parquet").write_bytes(content)
    flipped = say("launch", tiny_recipes["gpt"], "data.source=flipped.parquet", "--run-dir", "run")
    refused(flipped, "flipped.parquet: data.source: cannot be read as .parquet")


def test_folders_and_sizes_of_data(say: Any, tiny_recipes: dict[str, Path]) -> None:
    Path("none").mkdir()
    gpt = tiny_recipes["gpt"]
    refused(say("launch", gpt, "data.source=./none", "--run-dir", "run"), "no file of a known type in ./none")
    many = say("launch", gpt, "train.global_batch_size=100000", "train.micro_batch_size=auto", "--run-dir", "run")
    refused(many, "fewer than one batch of 100000; use at most ")


@pytest.mark.skipif(os.geteuid() == 0, reason="root reads everything")
def test_data_that_may_not_be_read(say: Any, tiny_recipes: dict[str, Path]) -> None:
    Path("mine.jsonl").write_text("".join(LINES))
    Path("mine.jsonl").chmod(0)
    refused(say("launch", tiny_recipes["gpt"], "data.source=./mine.jsonl", "--run-dir", "run"), "make it readable")


def outside(*argv: object) -> subprocess.CompletedProcess[str]:
    command = [sys.executable, "-m", "bigtrain", *map(str, argv)]
    return subprocess.run(command, capture_output=True, text=True, check=False)


@pytest.mark.slow
def test_paths_with_spaces_and_letters_of_any_language_and_steps_that_are_done(
    tiny_recipes: dict[str, Path], tmp_path: Path
) -> None:
    here = tmp_path / "ein Ördner 文書"
    here.mkdir()
    (here / "täxt ñ.jsonl").write_text("".join(LINES * 9))
    recipe = here / "mein rezept é.yaml"
    model = tiny_recipes["gpt"].read_text().split("data:")[0]
    data = f"data: {{source: '{here}/täxt ñ.jsonl', vocab_size: 300, sequence_length: 32, validation_fraction: 0.1}}\n"
    train = "train: {objective: clm, global_batch_size: 4, steps: 2, device: cpu}\noptimizer: {learning_rate: 1e-2}\n"
    recipe.write_text(model + data + train)
    run = here / "lauf ü"
    first = outside("launch", recipe, "--run-dir", run)
    assert (first.returncode, first.stderr) == (0, "")
    rows = (run / "metrics.jsonl").read_bytes()
    again = outside("launch", recipe, "--run-dir", run)
    assert (again.returncode, again.stderr) == (0, "")
    assert "2 steps are done already" in again.stdout
    assert (run / "metrics.jsonl").read_bytes() == rows
    for weights in run.glob("step-*/*.safetensors"):
        weights.write_bytes(weights.read_bytes()[:-1] + b"\x55")
    none = outside("launch", recipe, "train.steps=3", "--run-dir", run)
    assert none.returncode == 2 and "Traceback" not in none.stderr
    assert all(line.startswith("error: ") or "bigtrain" in line or "step-" in line for line in none.stderr.splitlines())


@pytest.mark.slow
def test_from_outside_nothing_is_made_and_it_is_soon(tmp_path: Path) -> None:
    for override in ("train.micro_batchsize=4", "optimizer.warmup_steps=9999999", "train.seed=1", "name=a\nb: *c"):
        begun = os.times()
        got = outside("launch", "quickstart_bert", override, "train.device=cpu", "--run-dir", tmp_path / "run")
        used = os.times()
        assert got.returncode == 2 and len(got.stderr.splitlines()) == 1 and got.stdout == "", got
        assert not (tmp_path / "run").exists()
        assert used.children_user + used.children_system - begun.children_user - begun.children_system < LIMIT_SECONDS
