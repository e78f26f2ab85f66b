"""How a run shows itself where there is no terminal."""

from __future__ import annotations

import pytest

from bigtrain.training.progress import RunProgress, figures

ROW = {
    "step": 20, "loss": 3.25, "learning_rate": 1e-4, "tokens_per_second": 12345.0, "mfu": 0.42,
    "allocated_bytes_peak": None, "host_bytes_peak": 3 * 2**30, "skipped": 0,
}  # fmt: skip


def test_a_plain_line_a_logged_step(capsys: pytest.CaptureFixture[str]) -> None:
    with RunProgress(100, step=0) as progress:
        progress.advance(20)
        progress.log(ROW, 95.0)
        progress.say("something else")
    out, err = capsys.readouterr()
    assert out.splitlines() == [
        "step 20/100  loss 3.2500  lr 1.00e-04  12.3K tokens/s  MFU 42%  3.00 GiB  1m35s left",
        "something else",
    ]
    assert err == ""


def test_device_memory_goes_before_host_memory() -> None:
    assert "2.00 GiB" in figures(ROW | {"allocated_bytes_peak": 2 * 2**30})


def test_skipped_steps_are_shown() -> None:
    assert figures(ROW | {"skipped": 2}).endswith("2 skipped")


def test_a_terminal_gets_a_bar(monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> None:
    monkeypatch.setenv("FORCE_COLOR", "1")
    monkeypatch.setenv("COLUMNS", "140")
    with RunProgress(100, step=10) as progress:
        progress.advance(20)
        progress.log(ROW, 95.0)
        progress.say("an evaluation")
    out = capsys.readouterr().out
    assert "20/100" in out
    assert "loss 3.2500" in out
    assert "an evaluation" in out
