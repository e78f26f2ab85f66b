"""Every command and every block of code in README and docs/ runs; what does not is in a table with the reason."""

from __future__ import annotations

import contextlib
import io
import json
import os
import re
import shutil
import sys
import warnings
from collections.abc import Iterator
from pathlib import Path
from typing import Any
from unittest import mock

import pytest
from documented import ROOT, Command, code, commands, pages

import bigtrain
from bigtrain import cli
from bigtrain.config.shipped import shipped_recipes

HISTORY = ("changelog.md", "decisions.md")
"""Pages that tell of what was, and show commands in passing."""

PAGES = {name: text for name, text in pages().items() if name not in HISTORY}

COMMANDS = {name: list(commands(name, text)) for name, text in PAGES.items()}

TINY = (
    "data.source=my/texts", "data.vocab_size=300", "data.validation_fraction=0.2",
    "model.hidden_size=32", "train.global_batch_size=4", "train.device=cpu",
)  # fmt: skip
"""Added to commands that would take minutes: a small model, little text."""

MADE_TINY = ("prepare", "profile")

NOT_RUN = {
    "sbatch": "needs Slurm; what it submits is held in tests/rendering/",
}
"""Programs that are not here, and why."""

PYTHON_RUN_ELSEWHERE = {
    "accelerate.md": "tests/test_accelerate.py runs both loops, on one process and on two",
    "overview.md": "tests/test_readme.py runs it",
    "inside/checkpoints.md": "needs ranks and a run in progress: tests/checkpoint/",
    "inside/sharding.md": "needs ranks: tests/sharding/",
}
"""Pages whose Python needs more than a process of its own."""

WORDS = "red green blue stone river tree bird sings def read return the object"

DEEPSPEED = {"train_batch_size": 32, "gradient_clipping": 1.0, "bf16": {"enabled": True}}
TRAINER = {"per_device_train_batch_size": 4, "learning_rate": 5e-5, "max_steps": 100, "bf16": True}


@pytest.fixture(scope="module")
def workshop(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Return a folder with all that the pages speak of: texts, the shipped recipes, a run of each quickstart."""
    folder = tmp_path_factory.mktemp("workshop")
    (folder / "my" / "texts").mkdir(parents=True)
    words = WORDS.split()
    lines = (" ".join(words[(n * 5 + k * (n % 3 + 1)) % 13] for k in range(8 + n % 17)) for n in range(400))
    (folder / "my" / "texts" / "a.txt").write_text("\n\n".join(lines))
    (folder / "ds.json").write_text(json.dumps(DEEPSPEED))
    (folder / "args.json").write_text(json.dumps(TRAINER))
    (folder / "recipes").symlink_to(ROOT / "recipes")
    with contextlib.chdir(folder):
        for name in ("quickstart_gpt", "quickstart_bert"):
            short = ["train.steps=2", "train.eval_every=null", "logging.trackers=[]", *TINY]
            bigtrain.train(bigtrain.plan(bigtrain.load_recipe(name, short)), f"runs/{name}")
    tokenizer = json.loads(next((folder / "runs" / "quickstart_gpt").glob("step-*/tokenizer.json")).read_text())
    tokenizer["model"]["vocab"]["brandnew"] = 1 + max(tokenizer["model"]["vocab"].values())
    (folder / "my" / "tokenizer.json").write_text(json.dumps(tokenizer))
    return folder


@pytest.fixture(scope="module")
def places(workshop: Path, tmp_path_factory: pytest.TempPathFactory) -> dict[str, Path]:
    """Return a copy of the workshop for each page, in which its commands and then its Python run."""
    return {
        name: Path(shutil.copytree(workshop, tmp_path_factory.mktemp("page") / "at", symlinks=True)) for name in PAGES
    }


ANSWERS: dict[tuple[str, ...], tuple[int, str, str]] = {}
"""What plans of shipped recipes gave, which several pages ask for."""


def answer(words: list[str]) -> tuple[int, str, str]:
    """Run a command, or return what the same plan gave before if nothing but what it prints is wanted of it."""
    key = tuple(word.removeprefix("recipes/").removesuffix(".yaml") for word in words)
    if words[0] != "plan" or "--output" in words or key[1] not in shipped_recipes():
        return run(words)
    if key not in ANSWERS:
        ANSWERS[key] = run(words)
    return ANSWERS[key]


def run(words: list[str]) -> tuple[int, str, str]:
    """Run a command in this process; return exit code, output and errors."""
    out, err = io.StringIO(), io.StringIO()
    streams = contextlib.redirect_stdout(out), contextlib.redirect_stderr(err)
    with streams[0], streams[1], mock.patch.dict(os.environ), pytest.MonkeyPatch.context() as patch:
        patch.setattr(sys, "argv", ["bigtrain", *words])
        with pytest.raises(SystemExit) as ended:
            cli.main()
    return int(ended.value.code or 0), out.getvalue(), err.getvalue()


def to_be_run(words: list[str], place: Path) -> list[str]:
    """Return the words of a command as they are run here: a launch only plans, in a run folder of its own."""
    if words[0] == "launch" and "--render" not in words:
        dry = [] if "--dry-run" in words else ["--dry-run"]
        return [*words, *dry, "--run-dir", str(place / "none")]
    return [*words, *TINY] if words[0] in MADE_TINY else words


def for_this_machine(words: list[str]) -> bool:
    """Tell whether a command plans for the machine it runs on, where what it names need not fit."""
    return words[0] in ("launch", "plan") and "--device" not in words


@pytest.mark.slow
@pytest.mark.parametrize("page", [name for name, found in COMMANDS.items() if found])
def test_commands_run(page: str, places: dict[str, Path], monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(places[page])
    for command in COMMANDS[page]:
        words = command.of_bigtrain()
        if words is None:
            check_other(command)
            continue
        exit_code, out, err = answer(to_be_run(words, places[page]))
        allowed = {command.exit_code, 3} if for_this_machine(words) else {command.exit_code}
        allowed |= {1} if words[0] == "doctor" else set()  # of this machine it may find what it likes
        assert exit_code in allowed, f"{command}: exit code {exit_code}: {err or out}"
        missing = [line for line in command.output if line.split() not in [told.split() for told in out.splitlines()]]
        assert not missing, f"{command} does not print {missing}"


def check_other(command: Command) -> None:
    """Hold a command of another program to what can be held without it."""
    program, *rest = command.words
    if program == "make":
        makefile = (ROOT / "Makefile").read_text(encoding="utf-8")
        assert re.search(rf"^{rest[0]}:", makefile, re.MULTILINE), command
    elif program == "python":
        assert (ROOT / rest[0]).is_file(), command
    else:
        assert program in NOT_RUN, f"{command}: {program} is neither run nor in the table of what is not"


@pytest.mark.slow
@pytest.mark.parametrize("page", [name for name in PAGES if code(PAGES[name], "python")])
def test_python_runs(page: str, places: dict[str, Path], monkeypatch: pytest.MonkeyPatch) -> None:
    blocks = code(PAGES[page], "python")
    if page in PYTHON_RUN_ELSEWHERE:
        for number, block in enumerate(blocks, 1):
            compile(block, f"{page}, block {number}", "exec")
        return
    monkeypatch.chdir(places[page])
    names: dict[str, Any] = {"__name__": page}
    with contextlib.redirect_stdout(io.StringIO()), warnings.catch_warnings():
        for number, block in enumerate(blocks, 1):
            exec(compile(block, f"{page}, block {number}", "exec"), names)


@pytest.mark.parametrize("page", [name for name in PAGES if code(PAGES[name], "yaml")])
def test_yaml_is_recipes(page: str, workshop: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(workshop)
    for number, shown in enumerate(code(PAGES[page], "yaml")):
        (tmp_path / f"{number}.yaml").write_text(shown)
        recipe = bigtrain.load_recipe(tmp_path / f"{number}.yaml", ["train.device=cpu"])
        assert bigtrain.plan(recipe).parameters > 0


def test_each_language_is_known() -> None:
    fences = {
        (name, language) for name, text in PAGES.items() for language in re.findall(r"^```(\w+)$", text, re.MULTILINE)
    }
    assert not {pair for pair in fences if pair[1] not in ("python", "yaml", "bash", "sh", "console", "text")}


def test_the_tables_hold_nothing_that_is_gone() -> None:
    assert set(PYTHON_RUN_ELSEWHERE) <= set(PAGES)
    assert {command.words[0] for found in COMMANDS.values() for command in found} >= set(NOT_RUN)


@pytest.fixture(autouse=True)
def _as_it_was() -> Iterator[None]:
    """Leave torch's settings as commands found them."""
    import torch

    threads = torch.get_num_threads()
    yield
    torch.set_num_threads(threads)
