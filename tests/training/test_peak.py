"""The measured rate: the best there ever was, per device."""

from __future__ import annotations

import json
from pathlib import Path

import pytest

from bigtrain.planner.hardware import Hardware
from bigtrain.training import peak
from bigtrain.training.peak import peak_flops

CPU = Hardware("cpu", "a processor", 1, 1)


@pytest.fixture(autouse=True)
def small(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(peak, "SIZES", {"cpu": 64})


def test_the_best_measurement_counts(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    assert peak_flops(CPU, "fp32", tmp_path / "cache") > 1e6
    for measured, best in ((7e15, 7e15), (3e15, 7e15), (8e15, 8e15)):
        monkeypatch.setattr(peak, "_measure", lambda *_, rate=measured: rate)
        assert peak_flops(CPU, "fp32", tmp_path / "cache") == best


def test_each_precision_and_device_has_its_own(tmp_path: Path) -> None:
    for precision in ("fp32", "bf16"):
        peak_flops(CPU, precision, tmp_path)
    peak_flops(Hardware("cpu", "another", 1, 1), "fp32", tmp_path)
    rates = json.loads((tmp_path / "rates.json").read_text())
    assert len(rates) == 3
    assert all(rate > 0 for rate in rates.values())
    assert [file.name for file in tmp_path.iterdir()] == ["rates.json"]


@pytest.mark.parametrize("damage", ["", "{", "[]"])
def test_a_damaged_cache_is_measured_again(tmp_path: Path, damage: str) -> None:
    (tmp_path / "rates.json").write_text(damage)
    assert peak_flops(CPU, "fp32", tmp_path) > 1e6
    assert json.loads((tmp_path / "rates.json").read_text())


def test_a_cache_that_cannot_be_written_stops_nothing(tmp_path: Path) -> None:
    (tmp_path / "file").write_text("")
    assert peak_flops(CPU, "fp32", tmp_path / "file") > 1e6
