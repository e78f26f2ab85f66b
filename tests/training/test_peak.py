"""The measured rate: once per device, then from the cache."""

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


def test_it_is_measured_once(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    first = peak_flops(CPU, "fp32", tmp_path / "cache")
    assert first > 1e6
    monkeypatch.setattr(peak, "_measure", lambda *_: pytest.fail("measured again"))
    assert peak_flops(CPU, "fp32", tmp_path / "cache") == first


def test_each_precision_and_device_has_its_own(tmp_path: Path) -> None:
    for precision in ("fp32", "bf16"):
        peak_flops(CPU, precision, tmp_path)
    peak_flops(Hardware("cpu", "another", 1, 1), "fp32", tmp_path)
    rates = json.loads((tmp_path / "rates.json").read_text())
    assert len(rates) == 3
    assert all(rate > 0 for rate in rates.values())
    assert [file.name for file in tmp_path.iterdir()] == ["rates.json"]
