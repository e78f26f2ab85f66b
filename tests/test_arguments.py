"""What several commands take from the command line."""

from __future__ import annotations

from importlib import metadata

import pytest
from typer.testing import CliRunner

import bigtrain
from bigtrain import terminal
from bigtrain.arguments import command_line, flags_first, load, settings
from bigtrain.cli import app
from bigtrain.errors import InputError, RecipeError


@pytest.mark.parametrize(
    ("typed", "taken"),
    [
        ("plan x --quiet a=1", "--quiet plan x a=1"),
        ("--verbose plan x", "--verbose plan x"),
        ("plan x --quiet -- --verbose", "--quiet plan x -- --verbose"),
        ("plan x --json", "plan x --json"),
        ("", ""),
    ],
)
def test_flags_stand_anywhere(typed: str, taken: str) -> None:
    assert flags_first(typed.split()) == taken.split()


def test_how_much_is_said(monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> None:
    monkeypatch.setenv(terminal.VARIABLE, "normal")
    settings(quiet=True)
    assert terminal.is_quiet()
    settings(verbose=True)
    assert terminal.is_verbose()
    assert "cache" in capsys.readouterr().err
    with pytest.raises(InputError, match="leave out one of them"):
        settings(quiet=True, verbose=True)


def test_the_version_is_told_whatever_else_is_said() -> None:
    for words in (["--version"], ["--quiet", "--version"], ["--version", "plan", "absent"]):
        told = CliRunner().invoke(app, words)
        assert (told.exit_code, told.output) == (0, f"bigtrain {bigtrain.__version__}\n")
    assert bigtrain.__version__ == metadata.version("bigtrain")


def test_a_command_is_shown_as_it_is_typed() -> None:
    assert command_line("launch", "my recipe.yaml", ["a.b=1"]) == "bigtrain launch 'my recipe.yaml' a.b=1"


def test_a_recipe_is_loaded_with_its_faults() -> None:
    assert load("quickstart_gpt", None).name == "quickstart_gpt"
    with pytest.raises(RecipeError, match="steps"):
        load("quickstart_gpt", ["train.stepz=1"])
