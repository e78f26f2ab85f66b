"""The commands about a run, in this process; tests/test_cli.py starts them as a user does."""

from __future__ import annotations

import io
import json
import shlex
from pathlib import Path

import pytest
import typer
from typer.testing import CliRunner

from bigtrain import run_commands
from bigtrain.errors import CheckpointError, InputError


@pytest.fixture
def app() -> typer.Typer:
    app = typer.Typer()
    run_commands.add_to(app)
    return app


@pytest.mark.parametrize(
    "words", [["eval"], ["generate", "--prompt", "x"], ["extend", "--tokenizer", "x"]], ids=lambda words: words[0]
)
def test_a_run_that_is_not_there_is_named(app: typer.Typer, tmp_path: Path, words: list[str]) -> None:
    command, *options = words
    done = CliRunner().invoke(app, [command, str(tmp_path / "no-run"), *options])
    assert isinstance(done.exception, CheckpointError)
    assert "no-run" in str(done.exception)


def test_what_is_asked_of_the_wrong_kind_is_refused_by_the_arguments(app: typer.Typer) -> None:
    done = CliRunner().invoke(app, ["generate", "run", "--prompt", "x", "--tokens", "0"])
    assert done.exit_code == 2
    assert "--tokens" in done.output


def test_a_model_goes_in_and_out_by_commands(app: typer.Typer, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    from safetensors.torch import save_file

    from bigtrain.config.model import ModelConfig
    from bigtrain.models import build_model
    from bigtrain.models.hf import to_hugging_face

    config = ModelConfig("gpt", 100, 32, 1, 2, 2, 64, 40)
    config_json, tensors = to_hugging_face(config, build_model(config).state_dict())
    (tmp_path / "theirs").mkdir()
    (tmp_path / "theirs" / "config.json").write_text(json.dumps(config_json))
    save_file(tensors, tmp_path / "theirs" / "model.safetensors")
    done = CliRunner().invoke(app, ["import", str(tmp_path / "theirs"), str(tmp_path / "in")])
    assert done.exit_code == 0, done.output
    assert "in: gpt, 1 blocks of width 32" in done.output
    assert f"bigtrain launch RECIPE train.init_from={tmp_path / 'in'} data.tokenizer=..." in done.output
    done = CliRunner().invoke(app, ["export", str(tmp_path / "in"), str(tmp_path / "out")])
    assert done.exit_code == 0, done.output
    assert "out: GPT2LMHeadModel of " in done.output
    assert "without a tokenizer" in done.output
    assert "AutoModelForCausalLM.from_pretrained(" in done.output
    done = CliRunner().invoke(app, ["export", str(tmp_path / "in"), str(tmp_path / "out")])
    assert isinstance(done.exception, InputError)
    monkeypatch.setenv("HOME", str(tmp_path))
    done = CliRunner().invoke(app, ["export", str(tmp_path / "in"), "~/it's out"])
    assert done.exit_code == 0, done.output
    *_, python, option, code = shlex.split(done.output.splitlines()[-1])
    assert (python, option) == ("python", "-c")
    assert code.endswith(f'AutoModelForCausalLM.from_pretrained("{tmp_path}/it\'s out")')


def test_extend_says_what_it_made_and_how_to_go_on(app: typer.Typer, monkeypatch: pytest.MonkeyPatch) -> None:
    from bigtrain.extension import extend

    made = extend.Extended(Path("runs/x-extended"), 500, 30522, 31000, 2)
    monkeypatch.setattr(extend, "extend", lambda run, tokenizer, output: made)
    done = CliRunner().invoke(app, ["extend", "runs/x", "--tokenizer", "new.json"])
    assert done.output.splitlines() == [
        "runs/x-extended: step 500, 30,522 tokens in the model became 31,000",
        "2 moments were rounded anew: their blocks fall otherwise in the larger matrices",
        "next: bigtrain launch runs/x-extended/plan.yaml --run-dir runs/x-extended",
    ]


@pytest.mark.parametrize(
    ("options", "said"),
    [
        ([], "--prompt: give the text here"),
        (["--prompt", "x", "--prompt-file", "y"], "--prompt: give the text here"),
        (["--prompt-file", "no-such-file"], "--prompt-file: no-such-file: No such file"),
        (["--prompt", "x", "--top-p", "0"], "--top-p: 0.0"),
        (["--prompt", "x", "--temperature", "inf"], "--temperature: inf"),
        (["--prompt", "x", "--seed", str(2**64)], "--seed: 18446744073709551616 is"),
        (["--prompt", "caf\udce9"], "--prompt: not a text in UTF-8; give a text"),
    ],
)
def test_a_prompt_or_choice_that_cannot_be_is_refused_before_the_run_is_read(app, options, said) -> None:
    done = CliRunner().invoke(app, ["generate", "no-run", *options])
    assert isinstance(done.exception, InputError)
    assert said in str(done.exception)


def test_a_prompt_is_read_from_standard_input_or_a_file(tmp_path: Path, monkeypatch) -> None:
    file = tmp_path / "prompt.txt"
    file.write_text("once")
    monkeypatch.setattr("sys.stdin", io.StringIO("upon"))
    assert run_commands._prompts([], file) == ["once"]
    assert run_commands._prompts(["a", "-"], None) == ["a", "upon"]
    file.write_bytes(b"caf\xe9")
    with pytest.raises(InputError, match=r"--prompt-file: .*prompt\.txt: not a text in UTF-8; name a text file"):
        run_commands._prompts([], file)
    monkeypatch.setattr("sys.stdin", io.TextIOWrapper(io.BytesIO(b"caf\xe9"), "utf-8"))
    with pytest.raises(InputError, match="--prompt: standard input: not a text in UTF-8; pipe a text into it"):
        run_commands._prompts(["-"], None)
