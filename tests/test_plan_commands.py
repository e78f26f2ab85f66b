"""`bigtrain plan`, in this process; tests/test_cli.py starts it as a user does."""

from __future__ import annotations

import json

import pytest
import typer
from typer.testing import CliRunner

from bigtrain.errors import InputError
from bigtrain.plan_commands import plan


@pytest.fixture
def app() -> typer.Typer:
    app = typer.Typer()
    app.command()(plan)
    return app


def test_the_next_command_stands_below_a_plan(app: typer.Typer) -> None:
    done = CliRunner().invoke(app, ["quickstart_gpt", "train.device=cpu", "--memory-budget", "2GiB"])
    assert done.exit_code == 0
    assert done.stdout.splitlines()[-1] == "next: bigtrain launch quickstart_gpt train.device=cpu memory.budget=2GiB"


def test_json_is_one_object_and_the_next_command_is_told_aside(app: typer.Typer) -> None:
    done = CliRunner().invoke(app, ["quickstart_gpt", "--device", "t4", "--json"])
    assert json.loads(done.stdout)["device"] == "t4"
    assert done.stderr == "next: bigtrain launch quickstart_gpt\n"


def test_flags_that_do_not_go_together(app: typer.Typer) -> None:
    done = CliRunner().invoke(app, ["quickstart_gpt", "--sweep", "--output", "plan.yaml"])
    assert isinstance(done.exception, InputError)
