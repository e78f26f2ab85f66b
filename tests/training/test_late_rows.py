"""Metrics rows that are read a step late: none is missing, and each is the one that it would have been."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
from trained import train

from bigtrain.errors import Interrupted
from bigtrain.step_result import StepResult
from bigtrain.training import run as run_module
from bigtrain.training.injected import changed
from bigtrain.training.late_rows import LateRows, reads_late
from bigtrain.training.meter import Due

TIMED = {"tokens_per_second", "model_flops_per_second", "mfu", "hfu", "seconds", "host_bytes_peak"}


def due(step: int) -> Due:
    zero = torch.zeros(())
    return Due(StepResult(zero, zero, torch.tensor(True), 0.1, zero), step, 10 * step, 0, 1, None, None, 0)


def test_a_gpu_is_read_late() -> None:
    assert reads_late(torch.device("cuda"))
    assert not reads_late(torch.device("cpu"))


def test_a_row_is_told_once_at_once_or_when_it_is_settled() -> None:
    for late in (False, True):
        told: list[Due] = []
        rows, one = LateRows(told.append, late=late), due(1)
        rows.settle()
        rows.add(one)
        assert told == ([] if late else [one])
        for _ in range(2):
            rows.settle()
            assert told == [one]


def without_times(rows: list[dict[str, Any]]) -> list[dict[str, Any]]:
    return [{name: value for name, value in row.items() if name not in TIMED} for row in rows]


OPTIONS = ("train.steps=5", "logging.every_steps=1", "checkpoint.every_steps=2", "train.eval_every=3")


@pytest.mark.slow
def test_late_rows_are_the_rows_of_a_run_that_reads_at_once(
    tiny_recipes: dict[str, Path], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Also of a run that stopped at a signal in between, and went on."""
    recipe = tiny_recipes["bert"]
    at_once = without_times(train(recipe, tmp_path / "at once", *OPTIONS))
    monkeypatch.setattr(run_module, "reads_late", lambda device: True)
    assert without_times(train(recipe, tmp_path / "late", *OPTIONS)) == at_once
    stop_in = 2

    def with_signal(output: Any, step: int) -> Any:
        if step == stop_in:
            import os
            import signal

            os.kill(os.getpid(), signal.SIGTERM)
        return changed(output, step)

    with monkeypatch.context() as patched:
        patched.setattr(run_module, "changed", with_signal)
        with pytest.raises(Interrupted):
            train(recipe, tmp_path / "stopped", *OPTIONS)
    assert without_times(train(recipe, tmp_path / "stopped", *OPTIONS)) == at_once
