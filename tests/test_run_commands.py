"""The commands about a run, in this process; tests/test_cli.py starts them as a user does."""

from __future__ import annotations

from pathlib import Path

import pytest
import typer
from typer.testing import CliRunner

from bigtrain import run_commands
from bigtrain.errors import CheckpointError


@pytest.fixture
def app() -> typer.Typer:
    app = typer.Typer()
    run_commands.add_to(app)
    return app


@pytest.mark.parametrize("words", [["eval"], ["generate", "--prompt", "x"]], ids=lambda words: words[0])
def test_a_run_that_is_not_there_is_named(app: typer.Typer, tmp_path: Path, words: list[str]) -> None:
    command, *options = words
    done = CliRunner().invoke(app, [command, str(tmp_path / "no-run"), *options])
    assert isinstance(done.exception, CheckpointError)
    assert "no-run" in str(done.exception)


def test_what_is_asked_of_the_wrong_kind_is_refused_by_the_arguments(app: typer.Typer) -> None:
    done = CliRunner().invoke(app, ["generate", "run", "--prompt", "x", "--tokens", "0"])
    assert done.exit_code == 2
    assert "--tokens" in done.output
