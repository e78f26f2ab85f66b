"""The measured rates: the best there ever were, per device, and little memory while measuring."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
import torch
from torch.profiler import ProfilerActivity, profile

from bigtrain.planner.hardware import Hardware
from bigtrain.planner.rates import MEASURES, kept, rates_of
from bigtrain.training import peak
from bigtrain.training.peak import measure, peak_flops

CPU = Hardware("cpu", "a processor", 1, 1)
MOST_BYTES = 13 * 2**20


@pytest.fixture
def small(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(peak, "PRODUCT_SIZES", {"cpu": 64})
    monkeypatch.setattr(peak, "ADDED_BYTES", {"cpu": 4096})
    monkeypatch.setattr(peak, "FRESH_BYTES", 65536)
    monkeypatch.setattr(peak, "TRIALS", 2)


@pytest.mark.usefixtures("small")
def test_the_best_measurement_counts(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    assert peak_flops(CPU, "fp32", tmp_path / "cache") > 1e6
    for measured, best in ((7e15, 7e15), (3e15, 7e15), (8e15, 8e15)):
        monkeypatch.setattr(peak, "measure", lambda *_, rate=measured: dict.fromkeys(MEASURES, rate))
        assert peak_flops(CPU, "fp32", tmp_path / "cache") == best


@pytest.mark.usefixtures("small")
def test_each_measure_has_its_own_best(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    for better in MEASURES:
        monkeypatch.setattr(peak, "measure", lambda *_, b=better: {m: 2e9 if m == b else 1e9 for m in MEASURES})
        peak_flops(CPU, "fp32", tmp_path)
    found = kept(tmp_path / "rates.json", CPU, "fp32", torch.get_num_threads())
    assert found == dict.fromkeys(MEASURES, 2e9)


@pytest.mark.usefixtures("small")
def test_each_precision_and_device_has_its_own(tmp_path: Path) -> None:
    for precision in ("fp32", "bf16"):
        peak_flops(CPU, precision, tmp_path)
    peak_flops(Hardware("cpu", "another", 1, 1), "fp32", tmp_path)
    rates = json.loads((tmp_path / "rates.json").read_text())
    assert len(rates) == 3
    assert all(rate > 0 for found in rates.values() for rate in found.values())
    assert [file.name for file in tmp_path.iterdir()] == ["rates.json"]


@pytest.mark.usefixtures("small")
def test_where_bf16_is_widened_fp32_is_measured_too(tmp_path: Path) -> None:
    peak_flops(Hardware("cpu", "a processor", 1, 1, slow_bf16=True), "bf16", tmp_path)
    assert len(json.loads((tmp_path / "rates.json").read_text())) == 2


@pytest.mark.usefixtures("small")
def test_what_is_kept_is_what_plans_read(tmp_path: Path) -> None:
    best = peak_flops(CPU, "fp32", tmp_path)
    found = rates_of(CPU, "fp32", torch.get_num_threads(), tmp_path)
    assert found.source == "measured here"
    assert found.product_flops_per_second == best


@pytest.mark.usefixtures("small")
@pytest.mark.parametrize("damage", ["", "{", "[]", '{"a processor / 1 threads / fp32 / torch 2": 1e11}'])
def test_a_damaged_cache_is_measured_again(tmp_path: Path, damage: str) -> None:
    (tmp_path / "rates.json").write_text(damage)
    assert peak_flops(CPU, "fp32", tmp_path) > 1e6
    assert len(json.loads((tmp_path / "rates.json").read_text())) == 1


@pytest.mark.usefixtures("small")
def test_a_cache_that_cannot_be_written_stops_nothing(tmp_path: Path) -> None:
    (tmp_path / "file").write_text("")
    assert peak_flops(CPU, "fp32", tmp_path / "file") > 1e6


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_what_a_gpu_multiplies_is_drawn_and_takes_no_random_number_from_training(dtype: torch.dtype) -> None:
    before = torch.get_rng_state()
    drawn = peak._drawn("cpu", dtype, 64, 32)
    assert drawn.shape == (64, 32) and drawn.dtype == dtype and 0.9 < float(drawn.float().std()) < 1.1
    assert torch.equal(drawn, peak._drawn("cpu", dtype, 64, 32))
    assert torch.equal(torch.get_rng_state(), before)


@pytest.mark.gpu
def test_measuring_a_gpu_takes_no_random_number_from_training() -> None:
    before = torch.get_rng_state(), torch.cuda.get_rng_state()
    assert set(measure("cuda", "bf16")) == set(MEASURES)
    after = torch.get_rng_state(), torch.cuda.get_rng_state()
    assert all(torch.equal(one, other) for one, other in zip(before, after, strict=True))


@pytest.mark.parametrize("precision", ["fp32", "bf16"])
def test_measuring_takes_little_memory(precision: str, monkeypatch: pytest.MonkeyPatch) -> None:
    """With the buffers that ship: the resident peak of a run on the CPU includes them."""
    monkeypatch.setattr(peak, "TRIALS", 1)
    with profile(activities=[ProfilerActivity.CPU], profile_memory=True) as recorded:
        found = measure("cpu", precision)
    assert set(found) == set(MEASURES)
    results: Any = recorded.profiler
    events = [event for event in results.kineto_results.events() if event.name() == "[memory]"]
    held = most = 0
    for event in sorted(events, key=lambda event: event.start_ns()):
        held += event.nbytes()
        most = max(most, held)
    assert 0 < most <= MOST_BYTES
    assert peak.FRESH_BYTES <= MOST_BYTES
