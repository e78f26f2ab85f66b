"""`bigtrain recipes`, in this process; tests/test_cli.py starts it as a user does."""

from __future__ import annotations

import re
from pathlib import Path

import pytest
from typer.testing import CliRunner

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
