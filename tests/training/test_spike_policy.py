"""What a run does about a spike of its loss, which rows it leaves out, and that a resume does the same."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
from spiking import Rows, order_of
from trained import RELEASED, losses, train

import bigtrain
from bigtrain.checkpoint import manifest
from bigtrain.engine import Engine
from bigtrain.errors import BigtrainError, RecipeError
from bigtrain.training.metrics import read_metrics

BAD = 8
"""The global batch that spikes, counted from 0."""


@pytest.fixture
def recipe(tiny_recipes: dict[str, Path]) -> Path:
    path = tiny_recipes["gpt"]
    path.write_text(path.read_text().replace("eval_every: 6", "eval_every: null"))
    return path


@pytest.fixture
def order(recipe: Path) -> list[str]:
    """Return what a run reads, batch by batch."""
    return order_of(bigtrain.plan(bigtrain.load_recipe(recipe)), 16)


@pytest.fixture
def rows(order: list[str], monkeypatch: pytest.MonkeyPatch) -> Rows:
    """Have batch `BAD` spike."""
    found = Rows(monkeypatch)
    found.bad = {order[BAD]}
    return found


def spikes_of(folder: Path) -> list[dict[str, Any]]:
    return [row for row in read_metrics(folder) if "spike_loss" in row]


def test_ignore_goes_on(rows: Rows, recipe: Path, tmp_path: Path) -> None:
    found = train(recipe, tmp_path / "run", "train.steps=10")
    assert losses(found)[BAD + 1] > 20
    assert not spikes_of(tmp_path / "run")
    assert found[-1]["skipped"] == 0


def test_stop_saves_nothing_of_it(rows: Rows, recipe: Path, tmp_path: Path) -> None:
    with pytest.raises(BigtrainError, match=r"^step 9: a loss of \d+\.\d+ is a spike, above \d.* is .*step-00000005$"):
        train(recipe, tmp_path / "run", "train.on_spike=stop")
    assert [folder.name for folder in manifest.step_folders(tmp_path / "run")] == ["step-00000005"]
    assert read_metrics(tmp_path / "run")[-1]["loss"] > 20


def test_skip_leaves_the_update_out(
    rows: Rows, order: list[str], recipe: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    held: dict[int, float] = {}
    plain = Engine.step

    def step(engine: Engine, max_norm: float | None = 1.0) -> Any:
        result = plain(engine, max_norm)
        held[engine.steps_taken] = sum(float(p.detach().double().sum()) for p in engine.parameters.values())
        return result

    monkeypatch.setattr(Engine, "step", step)
    found = train(recipe, tmp_path / "run", "train.on_spike=skip")
    assert held[BAD] == held[BAD + 1] != held[BAD + 2]
    assert rows.read == order[:12]
    assert found[-1]["skipped"] == 1
    (row,) = spikes_of(tmp_path / "run")
    loss, limit = losses(found)[BAD + 1], row["spike_limit"]
    assert row == {
        "step": BAD + 1, "tokens": row["tokens"], "spike_step": BAD + 1, "spike_loss": loss, "spike_limit": limit
    }  # fmt: skip
    assert limit < loss


def test_too_many_skips_end_the_run(rows: Rows, recipe: Path, tmp_path: Path) -> None:
    rows.bad_from = 8
    with pytest.raises(BigtrainError, match="^3 steps in a row had a loss .* or a spike"):
        train(recipe, tmp_path / "run", "train.on_spike=skip", "train.max_skipped=2")


def test_rollback_leaves_out_exactly_those_rows(
    rows: Rows, order: list[str], recipe: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    found = train(recipe, tmp_path / "run", "train.on_spike=rollback")
    assert rows.read == order[:16]
    assert [step for step, _ in rows.seen] == [*range(9), *range(5, 12)]
    assert list(losses(found)) == list(range(1, 13)), "each step is logged once"
    (row,) = spikes_of(tmp_path / "run")
    expected = {"step": 6, "spike_step": 9, "back_to": 5, "left_out_from": 5 * 8, "left_out_to": 9 * 8 - 1}
    assert expected.items() <= row.items()
    assert "back to step 5, rows 40 to 71 are left out" in capsys.readouterr().out
    state = json.loads((tmp_path / "run" / "step-00000012" / "state.json").read_text())
    assert state["notes"]["spikes"]["left_out"] == [[40, 71]]
    assert state["loader"]["row"] == 16 * 8


def test_rollback_ends_where_it_does_not_help(rows: Rows, recipe: Path, tmp_path: Path) -> None:
    rows.bad_from = 7
    with pytest.raises(BigtrainError, match="^step 8: a loss .* after going back 3 times .* is .*step-00000005$"):
        train(recipe, tmp_path / "run", "train.on_spike=rollback")
    assert [step for step, _ in rows.seen] == [*range(8), *[5, 6, 7] * 3]


def test_rollback_without_a_checkpoint(rows: Rows, recipe: Path, tmp_path: Path) -> None:
    with pytest.raises(BigtrainError, match="^step 9: a loss .* there is no checkpoint to go back to"):
        train(recipe, tmp_path / "run", "train.on_spike=rollback", "checkpoint.every_steps=null")


def test_rollback_with_gradient_release(rows: Rows, recipe: Path, tmp_path: Path) -> None:
    train(recipe, tmp_path / "run", "train.on_spike=rollback", *RELEASED)
    assert [step for step, _ in rows.seen] == [*range(9), *range(5, 12)]


def test_skip_does_not_go_with_gradient_release(recipe: Path) -> None:
    with pytest.raises(RecipeError, match=r"train\.on_spike: skip leaves out .*gradient_release=false"):
        bigtrain.plan(bigtrain.load_recipe(recipe, ["train.on_spike=skip", *RELEASED]))
    chosen = [text for text in RELEASED if "release" not in text]
    overrides = ["train.on_spike=skip", "optimizer.gradient_release=auto", *chosen]
    assert bigtrain.plan(bigtrain.load_recipe(recipe, overrides)).recipe.optimizer.gradient_release is False
