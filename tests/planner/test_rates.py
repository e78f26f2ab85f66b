"""Rates: the table's, this machine's, and a default that says so."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st

from bigtrain.planner import rates as module
from bigtrain.planner.devices import devices
from bigtrain.planner.hardware import Hardware, of_name
from bigtrain.planner.rates import MEASURES, constants, kept, key, rates_of, read_kept

HERE = Hardware("cpu", "a processor", 1, 2**34, slow_bf16=True)
GOOD = dict.fromkeys(MEASURES, 1e9) | {"product_flops_per_second": 5e10, "thin_product_flops_per_second": 4e10}


def write(folder: Path, found: Any) -> Path:
    (folder / "rates.json").write_text(json.dumps(found))
    return folder


@pytest.mark.parametrize("name", sorted(devices()))
def test_every_device_of_the_table_reaches_less_than_its_data_sheet(name: str) -> None:
    hardware = of_name(name)
    row = devices()[name]
    for precision, peak in row.flops_per_second.items():
        if precision == "tf32":
            continue
        rates = rates_of(hardware, precision, hardware.threads or 1)
        assert rates.source == "table"
        assert 0.4 * peak < rates.product_flops_per_second < peak
        assert 0.5 * row.memory_bytes_per_second < rates.memory_bytes_per_second < row.memory_bytes_per_second


def test_a_table_device_is_the_same_on_every_machine(tmp_path: Path) -> None:
    write(tmp_path, {key(of_name("h100"), "bf16", 1, "2.13"): GOOD})
    here = Hardware("cuda", "NVIDIA H100 80GB HBM3", 1, 80 * 2**30, device=of_name("h100").device)
    write(tmp_path, {key(here, "bf16", 1, "2.13.0"): GOOD})
    assert rates_of(of_name("h100"), "bf16", 1, tmp_path).source == "table"
    measured = rates_of(here, "bf16", 1, tmp_path)
    assert measured.source == "measured here"
    assert measured.product_flops_per_second == 5e10
    assert measured.multiprocessors == 132


def test_what_was_measured_here_comes_before_the_default(tmp_path: Path) -> None:
    assert rates_of(HERE, "fp32", 2, tmp_path).source.startswith("default")
    write(tmp_path, {key(HERE, "fp32", 2, "2.13.0"): GOOD})
    found = rates_of(HERE, "fp32", 2, tmp_path)
    assert found.source == "measured here"
    assert found.product_flops_per_second == 5e10
    assert found.fresh_seconds_per_byte == pytest.approx(1e-9)
    assert found.cache_bytes_per_second == 1e9
    assert found.call_seconds == pytest.approx(constants()["cpu"]["call_factor"] * 1e-9)


def test_threads_and_precision_have_rates_of_their_own(tmp_path: Path) -> None:
    write(tmp_path, {key(HERE, "fp32", 2, "2.13.0"): GOOD})
    assert kept(tmp_path / "rates.json", HERE, "fp32", 2)
    assert not kept(tmp_path / "rates.json", HERE, "fp32", 1)
    assert not kept(tmp_path / "rates.json", HERE, "fp32", 22)
    assert not kept(tmp_path / "rates.json", HERE, "bf16", 2)
    another = Hardware("cpu", "a processor too", 1, 2**34)
    assert not kept(tmp_path / "rates.json", another, "fp32", 2)


def test_where_bf16_is_emulated_products_have_the_rate_of_fp32(tmp_path: Path) -> None:
    write(tmp_path, {key(HERE, "fp32", 2, "2.13.0"): GOOD})
    assert rates_of(HERE, "bf16", 2, tmp_path).source == "measured here"
    quick = Hardware("cpu", "a processor", 1, 2**34)
    assert rates_of(quick, "bf16", 2, tmp_path).source != "measured here"


def test_the_best_of_several_versions_of_torch_counts(tmp_path: Path) -> None:
    better = GOOD | {"product_flops_per_second": 9e10}
    write(tmp_path, {key(HERE, "fp32", 2, "2.12.0"): better, key(HERE, "fp32", 2, "2.13.0"): GOOD})
    assert kept(tmp_path / "rates.json", HERE, "fp32", 2)["product_flops_per_second"] == 9e10


@pytest.mark.parametrize("text", ["", "{", "[]", "null", "7", "\x00", '{"a": NaN}', '{"a": 1e999}'])
def test_a_damaged_file_holds_no_rates(tmp_path: Path, text: str) -> None:
    (tmp_path / "rates.json").write_text(text)
    assert read_kept(tmp_path / "rates.json") == {}
    assert rates_of(HERE, "fp32", 2, tmp_path).source.startswith("default")


@given(st.sampled_from(MEASURES), st.sampled_from([None, "fast", 0.0, -1.0, 1e300, [], True, 3]))
def test_a_damaged_entry_is_left_out(measure: str, value: Any) -> None:
    import tempfile

    with tempfile.TemporaryDirectory() as folder:
        path = write(Path(folder), {"good": GOOD, "bad": GOOD | {measure: value}, "flat": 1e11}) / "rates.json"
        assert read_kept(path) == {"good": GOOD}


def test_an_absent_file_holds_no_rates(tmp_path: Path) -> None:
    assert read_kept(tmp_path / "absent" / "rates.json") == {}


def test_a_thin_product_says_how_often_operands_are_passed_over(tmp_path: Path) -> None:
    rates = []
    for thin in (5e10, 3e10, 1e10, 1e6):
        write(tmp_path, {key(HERE, "fp32", 2, "2.13.0"): GOOD | {"thin_product_flops_per_second": thin}})
        rates.append(rates_of(HERE, "fp32", 2, tmp_path).operand_passes)
    assert rates == sorted(rates)
    assert rates[0] == 0
    assert rates[-1] == 20


@pytest.mark.parametrize(
    ("flags", "fastest"), [("fma avx2 avx512f", "avx512"), ("fma avx2", "avx2"), ("sse4", "other"), ("", "other")]
)
def test_the_default_goes_by_the_processors_instructions(
    monkeypatch: pytest.MonkeyPatch, flags: str, fastest: str
) -> None:
    monkeypatch.setattr(module, "processor_field", lambda _name: flags)
    one, four = rates_of(HERE, "fp32", 1), rates_of(HERE, "fp32", 4)
    assert one.source == f"default for a processor with {fastest}"
    assert four.product_flops_per_second == pytest.approx(4 * one.product_flops_per_second)


def test_bf16_instructions_count(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(module, "processor_field", lambda _name: "avx512f avx512_bf16 amx_bf16")
    here = Hardware("cpu", "a processor", 1, 2**34)
    ratio = rates_of(here, "bf16", 1).product_flops_per_second / rates_of(here, "fp32", 1).product_flops_per_second
    assert ratio == constants()["cpu"]["default_bf16_speedup"]["amx_bf16"]


def test_a_gpu_that_nobody_knows_is_taken_for_the_nearest() -> None:
    strange = Hardware("cuda", "NVIDIA H999", 1, 85 * 10**9, capability=(9, 0))
    found = rates_of(strange, "bf16", 1)
    assert found.source.startswith("those of h100")
    assert found.product_flops_per_second == rates_of(of_name("h100"), "bf16", 1).product_flops_per_second
    assert "nearest" in rates_of(Hardware("cuda", "?", 1, 1), "fp32", 1).source


def test_without_instructions_for_a_precision_it_is_that_of_fp32() -> None:
    t4 = of_name("t4")
    assert rates_of(t4, "bf16", 1) == rates_of(t4, "fp32", 1)
    assert rates_of(t4, "fp16", 1).product_flops_per_second > rates_of(t4, "fp32", 1).product_flops_per_second


def test_fewer_threads_than_cores_compute_less() -> None:
    laptop = of_name("cpu-laptop")
    one, all_cores = rates_of(laptop, "fp32", 1), rates_of(laptop, "fp32", 4)
    assert all_cores.product_flops_per_second == pytest.approx(4 * one.product_flops_per_second)
    assert rates_of(laptop, "fp32", 64) == rates_of(laptop, "fp32", 64)


def test_every_constant_says_where_it_is_from() -> None:
    for part in ("cpu", "cuda", "links"):
        table = constants()[part]
        sources = " ".join(name for name in table if name.endswith("_source"))
        for name in table:
            stem = name.split("_")[0]
            assert name.endswith("_source") or stem in sources, f"{part}.{name} has no source"


def test_the_file_says_what_was_not_measured_by_us() -> None:
    assert "No CUDA device" in constants()["about"]
    assert "not measured by us" in constants()["cuda"]["product_share_source"]
    assert set(constants()["cuda"]["product_share"]) >= {
        row.architecture for row in devices().values() if row.kind == "cuda"
    }
