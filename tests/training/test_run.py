"""A run under way: what it logs, when it saves, how it stops."""

from __future__ import annotations

import signal
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
import torch
from trained import RELEASED, losses, train

import bigtrain
from bigtrain.engine import Engine
from bigtrain.errors import BigtrainError, Interrupted, NonFiniteGradient
from bigtrain.training.metrics import read_metrics
from bigtrain.training.run import Run


def test_a_row_holds_what_the_interface_names(tiny_recipes: dict[str, Path], tmp_path: Path) -> None:
    row = train(tiny_recipes["bert"], tmp_path / "run", "train.steps=2", "train.eval_every=null")[-1]
    names = (
        "step tokens loss grad_norm learning_rate tokens_per_second model_flops_per_second mfu hfu "
        "allocated_bytes_peak reserved_bytes_peak host_bytes_peak loss_scale skipped seconds"
    )
    assert set(names.split()) <= set(row)
    assert row["allocated_bytes_peak"] is None
    assert row["host_bytes_peak"] > 50e6
    assert 0 < row["tokens"] <= 2 * 8 * 32
    assert row["skipped"] == 0


def signal_after(monkeypatch: pytest.MonkeyPatch, steps: int) -> None:
    """Have SIGTERM come in the step after so many."""
    plain = Engine.step

    def signalled(engine: Engine, max_norm: float | None = 1.0) -> Any:
        if engine.steps_taken == steps:
            signal.raise_signal(signal.SIGTERM)
        return plain(engine, max_norm)

    monkeypatch.setattr(Engine, "step", signalled)


def test_a_signal_saves_and_stops(
    tiny_recipes: dict[str, Path], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    signal_after(monkeypatch, 6)
    with pytest.raises(Interrupted, match="SIGTERM: saved step 7"):
        train(tiny_recipes["gpt"], tmp_path / "run")
    monkeypatch.undo()
    assert (tmp_path / "run" / "step-00000007" / "manifest.json").is_file()
    assert signal.getsignal(signal.SIGTERM) == signal.SIG_DFL
    resumed = losses(train(tiny_recipes["gpt"], tmp_path / "run"))
    assert resumed == losses(train(tiny_recipes["gpt"], tmp_path / "whole"))


@pytest.mark.parametrize("section", ["every_steps=4", "every_minutes=1e-9"])
def test_checkpoints_by_steps_and_by_time(tiny_recipes: dict[str, Path], tmp_path: Path, section: str) -> None:
    train(
        tiny_recipes["gpt"], tmp_path / "run", "checkpoint.every_steps=null", f"checkpoint.{section}", "train.steps=9"
    )
    saved = sorted(folder.name for folder in (tmp_path / "run").glob("step-*"))
    assert saved == [f"step-{s:08d}" for s in ((4, 8, 9) if "steps" in section else (7, 8, 9))]


def test_too_many_steps_that_are_not_finite(
    tiny_recipes: dict[str, Path], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    plain = Engine.backward

    def broken(engine: Engine, loss: torch.Tensor) -> None:
        plain(engine, loss * (float("nan") if engine.steps_taken >= 6 else 1.0))

    monkeypatch.setattr(Engine, "backward", broken)
    with pytest.raises(BigtrainError, match=r"3 steps in a row .* last good checkpoint is .*step-00000005"):
        train(tiny_recipes["gpt"], tmp_path / "run", "train.max_skipped=2")
    rows = read_metrics(tmp_path / "run")
    assert [row["loss"] for row in rows if "loss" in row][-3:] == ["nan", "nan", "nan"]
    assert rows[-1]["skipped"] == 3


def test_a_gradient_that_is_not_finite_ends_a_run_with_release(
    tiny_recipes: dict[str, Path], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    plain = Engine.backward

    def broken(engine: Engine, loss: torch.Tensor) -> None:
        if engine.steps_taken == 9:  # the loss stays finite; the derivative of the root is infinite at 0, times 0
            loss = loss + (next(engine.model.parameters()).sum() * 0).sqrt()
        plain(engine, loss)

    monkeypatch.setattr(Engine, "backward", broken)
    with pytest.raises(NonFiniteGradient, match=r"^step 10: .*; the last good checkpoint is .*step-00000005") as caught:
        train(tiny_recipes["gpt"], tmp_path / "run", *RELEASED)
    assert caught.value.exit_code == 1
    assert len(str(caught.value).splitlines()) == 1
    assert [folder.name for folder in (tmp_path / "run").glob("step-*")] == ["step-00000005"]
    monkeypatch.undo()
    assert losses(train(tiny_recipes["gpt"], tmp_path / "run", *RELEASED)) == losses(
        train(tiny_recipes["gpt"], tmp_path / "whole", *RELEASED)
    )


def test_with_release_steps_whose_loss_is_not_finite_are_skipped(
    tiny_recipes: dict[str, Path], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    plain = Engine.backward
    monkeypatch.setattr(
        Engine, "backward", lambda engine, loss: plain(engine, loss * (float("inf") if engine.steps_taken == 3 else 1))
    )
    rows = [row for row in train(tiny_recipes["gpt"], tmp_path / "run", *RELEASED) if "loss" in row]
    assert [row["skipped"] for row in rows] == [0] * 3 + [1] * 9
    assert rows[3]["loss"] == "inf"


@pytest.mark.parametrize("change", ["amp.precision=bf16", "train.max_grad_norm=null", "optimizer.schedule=cosine",
                                    "train.epochs=0.3", "data.packing=false", "train.z_loss=1e-4",
                                    "train.label_smoothing=0.1", "train.attention_dropout=0.1",
                                    "optimizer.name=muon", "optimizer.name=adafactor", "optimizer.state=8bit",
                                    "optimizer.state=4bit"])  # fmt: skip
def test_each_setting_trains(tiny_recipes: dict[str, Path], tmp_path: Path, change: str) -> None:
    plain = losses(train(tiny_recipes["bert"], tmp_path / "plain"))
    changed = losses(train(tiny_recipes["bert"], tmp_path / "changed", change))
    assert changed != plain
    assert changed[max(changed)] < changed[1]


def test_what_is_said_while_training(
    tiny_recipes: dict[str, Path], tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    train(tiny_recipes["bert"], tmp_path / "run")
    out = capsys.readouterr().out
    assert "from new weights" in out
    assert "step 12/12  loss " in out
    assert "evaluation at step 12: loss " in out
    assert "than token frequencies alone (" in out


def evaluations(rows: list[dict[str, Any]]) -> dict[int, float]:
    return {row["step"]: row["eval_loss"] for row in rows if "eval_loss" in row}


@pytest.mark.parametrize("step", [5, 12])
def test_an_evaluation_that_fails_loses_no_step_and_is_made_up_for(
    tiny_recipes: dict[str, Path], tmp_path: Path, monkeypatch: pytest.MonkeyPatch, step: int
) -> None:
    every = "train.eval_every=5"  # as often as a checkpoint, and after the last step
    plain = Run._evaluate

    def failing(run: Run) -> None:
        if run._state.step == step:
            raise RuntimeError("no evaluation today")
        plain(run)

    monkeypatch.setattr(Run, "_evaluate", failing)
    with pytest.raises(RuntimeError, match="no evaluation today"):
        train(tiny_recipes["gpt"], tmp_path / "run", every)
    monkeypatch.undo()
    assert (tmp_path / "run" / f"step-{step:08d}" / "manifest.json").is_file()
    assert step not in evaluations(read_metrics(tmp_path / "run"))
    rows, whole = (train(tiny_recipes["gpt"], tmp_path / name, every) for name in ("run", "whole"))
    assert evaluations(rows) == evaluations(whole)
    assert set(evaluations(rows)) == {5, 10, 12}
    assert losses(rows) == losses(whole)
    assert train(tiny_recipes["gpt"], tmp_path / "run", every) == rows


def test_a_signal_saves_before_an_evaluation_which_comes_later(
    tiny_recipes: dict[str, Path], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    signal_after(monkeypatch, 5)
    with pytest.raises(Interrupted, match="SIGTERM: saved step 6"):
        train(tiny_recipes["gpt"], tmp_path / "run")
    monkeypatch.undo()
    assert not evaluations(read_metrics(tmp_path / "run"))
    rows, whole = (train(tiny_recipes["gpt"], tmp_path / name) for name in ("run", "whole"))
    assert evaluations(rows) == evaluations(whole)
    assert set(evaluations(rows)) == {6, 12}


def test_steps_that_are_skipped_in_a_row_are_counted_across_a_stop(
    tiny_recipes: dict[str, Path], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    plain = Engine.backward

    def broken(engine: Engine, loss: torch.Tensor) -> None:
        if engine.steps_taken == 7:
            signal.raise_signal(signal.SIGTERM)
        plain(engine, loss * (float("nan") if engine.steps_taken >= 6 else 1.0))

    monkeypatch.setattr(Engine, "backward", broken)
    with pytest.raises(Interrupted, match="SIGTERM: saved step 8"):
        train(tiny_recipes["gpt"], tmp_path / "run", "train.max_skipped=2")
    with pytest.raises(BigtrainError, match=r"3 steps in a row"):
        train(tiny_recipes["gpt"], tmp_path / "run", "train.max_skipped=2")
    rows = [row for row in read_metrics(tmp_path / "run") if "loss" in row]
    assert [(row["step"], row["skipped"]) for row in rows[-4:]] == [(6, 0), (7, 1), (8, 2), (9, 3)]


FULL = """
import errno, os, sys
import bigtrain.training.__main__ as process, bigtrain.training.loop as loop
def full(*arguments, **options):
    raise OSError(errno.ENOSPC, "No space left on device", "runs/x/plan.yaml")
loop.train = full
sys.argv = ["process", str(os.getppid()), "runs/x", ""]
sys.exit(process.main())
"""


def test_a_disk_that_is_full_from_the_start_is_told_in_one_line(tiny_recipes: dict[str, Path]) -> None:
    text = bigtrain.plan(bigtrain.load_recipe(tiny_recipes["gpt"])).to_yaml()
    found = subprocess.run([sys.executable, "-c", FULL], input=text, capture_output=True, text=True, check=False)
    where = "runs/x/plan.yaml: No space left on device"
    assert found.stderr == f"error: {where}; free some space there, or use another --run-dir\n"
    assert found.returncode == 1
