"""`bigtrain recipes`, in this process; tests/test_cli.py starts it as a user does."""

from __future__ import annotations

import json
import re
from pathlib import Path

import pytest
from typer.testing import CliRunner

from bigtrain.config.load import load_recipe
from bigtrain.config.shipped import shipped_recipes
from bigtrain.errors import InputError
from bigtrain.recipe_commands import recipes_app, write_file


def printed(*words: str) -> str:
    done = CliRunner().invoke(recipes_app, list(words))
    if done.exception is not None:
        raise done.exception
    return done.output


def test_every_shipped_recipe_is_listed_with_what_it_is() -> None:
    lines = printed().splitlines()
    listed = dict(re.split(r"\s{2,}", line, maxsplit=1) for line in lines if "  " in line)
    assert set(listed) == set(shipped_recipes())
    assert all(listed.values())


@pytest.mark.parametrize("name", sorted(shipped_recipes()))
def test_a_recipe_is_shown_as_it_is(name: str) -> None:
    assert printed("show", name) == shipped_recipes()[name].read_text(encoding="utf-8")


def test_an_unknown_recipe_is_told() -> None:
    with pytest.raises(InputError, match="did you mean 'bert_large'"):
        printed("show", "bert_larg")


def test_a_copy_is_the_same_and_writes_over_nothing(tmp_path: Path) -> None:
    file = tmp_path / "mine.yaml"
    assert printed("copy", "bert_base", str(file)).startswith(f"{file}: written; next: ")
    text = printed("show", "bert_base")
    assert file.read_text() == text
    with pytest.raises(InputError, match=r"mine\.yaml: File exists; name another file"):
        printed("copy", "gpt_7b", str(file))
    assert file.read_text() == text


def test_a_file_is_written_over_only_if_asked(tmp_path: Path) -> None:
    file = tmp_path / "file"
    write_file(file, "é", "w")
    write_file(file, "b", "w")
    assert file.read_text(encoding="utf-8") == "b"
    with pytest.raises(InputError):
        write_file(file, "c", "x")


def test_a_folder_that_is_not_there_is_told(tmp_path: Path) -> None:
    with pytest.raises(InputError, match="command line: .*: No such file or directory; name another file"):
        write_file(tmp_path / "none" / "file", "a", "w")


DEEPSPEED = {
    "train_micro_batch_size_per_gpu": 4,
    "zero_optimization": {"stage": 2},
    "flops_profiler": {"enabled": True},
}
TRAINER = {"per_device_train_batch_size": 4, "max_steps": 10, "tf32": True}


@pytest.mark.parametrize(("command", "values"), [("from-deepspeed", DEEPSPEED), ("from-trainer", TRAINER)])
def test_a_configuration_is_translated(command: str, values: dict[str, object], tmp_path: Path) -> None:
    theirs, recipe = tmp_path / "theirs.json", tmp_path / "mine.yaml"
    theirs.write_text(json.dumps(values))
    done = CliRunner().invoke(recipes_app, [command, str(theirs), "--world-size", "8", "--model", "bert-base"])
    assert done.exit_code == 0
    assert "  global_batch_size: 32  # " in done.stdout and "# No counterpart:\n" in done.stdout
    assert "no counterpart: " in done.stderr
    options = ["--world-size", "8", "--model", "bert-base", "--output", str(recipe)]
    text = printed(command, str(theirs), *options)
    assert f"{recipe}: written; complete what is marked placeholder; next: bigtrain plan {recipe}" in text
    assert recipe.read_text(encoding="utf-8") == done.stdout
    assert load_recipe(recipe).train.global_batch_size == 32
    with pytest.raises(InputError, match=r"mine\.yaml: File exists; name another file"):
        printed(command, str(theirs), *options)


@pytest.mark.parametrize("command", ["from-deepspeed", "from-trainer"])
def test_a_configuration_that_is_none_is_told_with_its_line(command: str, tmp_path: Path) -> None:
    (tmp_path / "theirs.json").write_text('{\n "a": 1\n "b": 2}')
    with pytest.raises(InputError, match=r"theirs\.json:3: broken JSON: Expecting ',' delimiter"):
        printed(command, str(tmp_path / "theirs.json"), "--output", str(tmp_path / "mine.yaml"))
    assert not (tmp_path / "mine.yaml").exists()
