"""The table of devices: complete, plausible, consistent with the arithmetic of its chips, and found by any spelling."""

from __future__ import annotations

import json
import re
from pathlib import Path

import pytest
from hypothesis import given
from hypothesis import strategies as st

from bigtrain.errors import InputError
from bigtrain.planner import devices as module
from bigtrain.planner.devices import Device, device, device_of_driver, devices

PROMISED = """t4 v100-16gb v100-32gb rtx3060 rtx3090 rtx4090 rtx5090 a10 a6000 l4 l40s a100-40gb a100-80gb h100 h200
b200 gh200 mi300x"""
"""Of the interface."""

WANTED = """rtx3070 rtx3080 rtx4060ti-16gb rtx4070 rtx4080 rtx5070 rtx5080 a10g a40 rtx6000-ada l40 a30 h100-pcie
h100-nvl mi250x"""

ALL = list(devices().values())
CUDA = [entry for entry in ALL if entry.kind == "cuda"]
NVIDIA = [entry for entry in CUDA if entry.capability]

PER_CLOCK = {
    # Dense FLOP of one multiprocessor in a cycle, a product accumulated in fp32: whitepapers of the architectures.
    "volta": {"fp32": 128, "fp16": 1024},
    "ampere": {"fp32": 128, "tf32": 1024, "fp16": 2048, "bf16": 2048},
    "hopper": {"tf32": 2048, "fp16": 4096, "bf16": 4096, "fp8": 8192},
    "geforce": {"fp32": 256, "tf32": 256, "fp16": 512, "bf16": 512, "fp8": 1024},
    "professional": {"fp32": 256, "tf32": 512, "fp16": 1024, "bf16": 1024, "fp8": 2048},
    "cdna2": {"fp32": 256, "fp16": 1024, "bf16": 1024},
    "cdna3": {"fp32": 256, "tf32": 1024, "fp16": 2048, "bf16": 2048, "fp8": 4096},
    "cdna4": {"fp32": 256, "fp16": 4096, "bf16": 4096, "fp8": 8192},
}

CLOCKS = {
    # Peak clock in GHz (product pages and whitepapers), and which of the rows above.
    "v100-16gb": (1.530, "volta"),
    "v100-pcie-16gb": (1.370, "volta"),
    "a100-80gb": (1.410, "ampere"),
    "a30": (1.440, "ampere"),
    "h100": (1.830, "hopper"),
    "h100-pcie": (1.620, "hopper"),
    "rtx3060": (1.777, "geforce"),
    "rtx3070": (1.725, "geforce"),
    "rtx3080": (1.710, "geforce"),
    "rtx3090": (1.695, "geforce"),
    "a10g": (1.710, "geforce"),
    "a10": (1.695, "professional"),
    "a40": (1.740, "professional"),
    "a6000": (1.800, "professional"),
    "rtx4060ti-16gb": (2.535, "geforce"),
    "rtx4070": (2.475, "geforce"),
    "rtx4080": (2.505, "geforce"),
    "rtx4090": (2.520, "geforce"),
    "l40": (2.490, "geforce"),
    "l40s": (2.520, "professional"),
    "l4": (2.040, "professional"),
    "rtx6000-ada": (2.505, "professional"),
    "rtx5070": (2.512, "geforce"),
    "rtx5080": (2.617, "geforce"),
    "rtx5090": (2.407, "geforce"),
    "rtx-pro-6000": (2.617, "professional"),
    "mi210": (1.700, "cdna2"),
    "mi250x": (1.700, "cdna2"),
    "mi300x": (2.100, "cdna3"),
    "mi355x": (2.400, "cdna4"),
}

PCIE_BYTES_PER_LANE = {3: 0.985e9, 4: 1.969e9, 5: 3.938e9}
"""One direction after line coding: PCI-SIG."""


def names(entries: list[Device]) -> list[str]:
    return [entry.name for entry in entries]


@pytest.mark.parametrize("name", [*PROMISED.split(), *WANTED.split()])
def test_the_devices_that_were_promised_are_there(name: str) -> None:
    assert device(name).name == name


def test_there_are_enough_and_the_names_are_plain() -> None:
    assert len(ALL) >= 30
    assert all(re.fullmatch(r"[a-z0-9]+(-[a-z0-9]+)*", entry.name) for entry in ALL)


@pytest.mark.parametrize("entry", ALL, ids=names(ALL))
def test_an_entry_is_complete_and_plausible(entry: Device) -> None:
    assert entry.source and entry.source[0].isupper()
    assert entry.kind in {"cpu", "cuda"} and entry.memory_known in {"driver", "reported", "nominal"}
    assert 7e9 < entry.memory_bytes < 1e12 and type(entry.memory_bytes) is int
    assert 4 <= entry.multiprocessors <= 400
    assert 50e9 <= entry.memory_bytes_per_second <= 10e12
    assert 8e9 < entry.host_memory_bytes < 1e12
    assert set(entry.flops_per_second) <= {"fp32", "tf32", "fp16", "bf16", "fp8"} and "fp32" in entry.flops_per_second
    assert all(1e11 < rate < 1e16 for rate in entry.flops_per_second.values())


@pytest.mark.parametrize("entry", CUDA, ids=names(CUDA))
def test_a_gpu_has_a_context_a_workspace_and_a_link_to_its_host(entry: Device) -> None:
    assert 80 * 2**20 <= entry.context_bytes <= 2 * 2**30
    assert entry.workspace_bytes in {8_519_680, 32 * 2**20, 128 * 2**20}
    assert entry.host_bytes_per_second is not None and 10e9 < entry.host_bytes_per_second < 500e9
    assert entry.driver_names
    assert (entry.peer_bytes_per_second is None) == (entry.peer_devices == 1)


@pytest.mark.parametrize("entry", [each for each in ALL if each.kind == "cpu"], ids=lambda entry: entry.name)
def test_a_cpu_is_its_own_host(entry: Device) -> None:
    assert entry.memory_bytes == entry.host_memory_bytes
    assert entry.context_bytes == entry.workspace_bytes == 0
    assert entry.host_bytes_per_second is None and entry.peer_bytes_per_second is None


@pytest.mark.parametrize("entry", ALL, ids=names(ALL))
def test_fewer_bits_are_no_slower(entry: Device) -> None:
    rates = [entry.flops_per_second[each] for each in ("fp32", "tf32", "bf16", "fp8") if each in entry.flops_per_second]
    assert rates == sorted(rates)
    if entry.kind == "cuda" and "bf16" in entry.flops_per_second:
        assert entry.flops_per_second["bf16"] == entry.flops_per_second["fp16"]
    if "fp8" in entry.flops_per_second:
        assert entry.flops_per_second["fp8"] / entry.flops_per_second["bf16"] == pytest.approx(2, rel=0.02)


@pytest.mark.parametrize("entry", NVIDIA, ids=names(NVIDIA))
def test_a_gpu_has_the_precisions_of_its_capability(entry: Device) -> None:
    assert entry.capability is not None
    assert ("bf16" in entry.flops_per_second) == ("tf32" in entry.flops_per_second) == (entry.capability >= (8, 0))
    assert ("fp8" in entry.flops_per_second) == (entry.capability >= (8, 9))
    assert (entry.workspace_bytes == 32 * 2**20) == (entry.capability[0] >= 9)


@pytest.mark.parametrize("name", CLOCKS)
def test_peaks_are_what_the_chip_can_do_in_its_clock(name: str) -> None:
    entry, (clock, row) = devices()[name], CLOCKS[name]
    for precision, per_clock in PER_CLOCK[row].items():
        if precision in entry.flops_per_second:
            peak = entry.multiprocessors * per_clock * clock * 1e9
            assert entry.flops_per_second[precision] == pytest.approx(peak, rel=0.02), precision


@pytest.mark.parametrize("entry", CUDA, ids=names(CUDA))
def test_copies_to_the_host_reach_four_fifths_of_the_link(entry: Device) -> None:
    assert (entry.pcie_generation is None) == (entry.pcie_lanes is None)
    if entry.pcie_generation is not None and entry.pcie_lanes is not None:
        link = PCIE_BYTES_PER_LANE[entry.pcie_generation] * entry.pcie_lanes
        assert entry.host_bytes_per_second == pytest.approx(0.8 * link, rel=0.01)


def test_where_a_data_sheet_gives_them_numbers_are_its_numbers() -> None:
    assert device("h100").flops_per_second == {
        "fp32": 66.9e12,
        "tf32": 494.7e12,
        "fp16": 989.4e12,
        "bf16": 989.4e12,
        "fp8": 1978.9e12,
    }
    assert device("rtx4090").flops_per_second["bf16"] == 165.2e12
    assert device("rtx5090").flops_per_second["fp8"] == pytest.approx(419e12, rel=1e-3)
    assert device("a100-40gb").memory_bytes_per_second == 1555e9
    assert device("h100").peer_bytes_per_second == 450e9
    assert device("b200").capability == (10, 0)


def test_usable_memory_is_below_what_is_built_in() -> None:
    built_in = {
        "t4": 16,
        "v100-32gb": 32,
        "rtx4090": 24,
        "rtx5090": 32,
        "a6000": 48,
        "h100": 80,
        "h200": 141,
        "a10g": 24,
    }
    for name, gib in built_in.items():
        assert 0.9 * gib < device(name).memory_bytes / 2**30 < gib
        assert device(name).memory_known != "nominal"


@pytest.mark.parametrize(
    ("driver", "memory_bytes", "name"),
    [
        ("NVIDIA H100 80GB HBM3", 85_029_158_912, "h100"),
        ("NVIDIA H100 PCIe", 84_942_979_072, "h100-pcie"),
        ("NVIDIA H200", 150_109_880_320, "h200"),
        ("NVIDIA B200", 191_510_872_064, "b200"),
        ("NVIDIA GH200 480GB", 101_468_602_368, "gh200"),
        ("NVIDIA A100-SXM4-40GB", 42_298_834_944, "a100-40gb"),
        ("NVIDIA A100-SXM4-80GB", 84_987_740_160, "a100-80gb"),
        ("NVIDIA A100 80GB PCIe", 84_974_239_744, "a100-80gb-pcie"),
        ("Tesla V100-SXM2-16GB", 16_945_512_448, "v100-16gb"),
        ("Tesla T4", 15_828_320_256, "t4"),
        ("NVIDIA GeForce RTX 4090", 25_757_220_864, "rtx4090"),
        ("NVIDIA GeForce RTX 4060 Ti", 16_713_973_760, "rtx4060ti-16gb"),
        ("NVIDIA RTX A6000", 51_041_271_808, "a6000"),
        ("NVIDIA RTX 6000 Ada Generation", 50_865_307_648, "rtx6000-ada"),
        ("NVIDIA A10G", 23_683_674_112, "a10g"),
        ("AMD Instinct MI300X", 206_141_652_992, "mi300x"),
        ("AMD Instinct MI250X/MI250", 68_702_699_520, "mi250x"),
    ],
)
def test_what_a_driver_calls_a_device_is_found(driver: str, memory_bytes: int, name: str) -> None:
    found = device_of_driver(driver, memory_bytes)
    assert found is not None and found.name == name
    assert device(driver).name == name


@pytest.mark.parametrize(
    ("driver", "memory_bytes"),
    [
        ("NVIDIA GeForce RTX 4060 Ti", 8_585_740_288),
        ("NVIDIA GeForce RTX 3080", 12_622_168_064),
        ("NVIDIA GeForce RTX 4090 Laptop GPU", 16_859_136_000),
        ("NVIDIA GeForce RTX 4090 D", 25_250_000_000),
        ("NVIDIA A100-SXM4-40GB MIG 1g.5gb", 5_100_273_664),
        ("NVIDIA H100 80GB HBM3", 0),
        ("Some other device", 85_029_158_912),
    ],
)
def test_what_only_looks_like_an_entry_is_none(driver: str, memory_bytes: int) -> None:
    assert device_of_driver(driver, memory_bytes) is None


@pytest.mark.parametrize("entry", ALL, ids=names(ALL))
def test_every_name_and_driver_name_means_one_entry(entry: Device) -> None:
    for name in (entry.name, *entry.driver_names):
        assert device(name) is entry
        assert device_of_driver(name, entry.memory_bytes) is entry


@given(
    st.sampled_from(ALL), st.sampled_from(["", "nvidia-", "NVIDIA ", "Tesla_"]), st.sampled_from(["-", " ", "_", ""])
)
def test_case_separators_and_vendor_do_not_matter(entry: Device, vendor: str, separator: str) -> None:
    written = vendor + entry.name.replace("-", separator)
    assert device(written) is device(written.upper()) is device(f" {written} ") is entry


@given(st.text(max_size=80))
def test_any_text_is_a_device_or_an_input_error(text: str) -> None:
    try:
        assert device(text).name in devices()
    except InputError as error:
        assert len(error.faults) == 1


@pytest.mark.parametrize(
    ("name", "expected"),
    [
        ("h10O", "command line: --device: 'h10O' is not in the table of devices; did you mean 'h100'?"),
        ("rtx409O", "did you mean 'rtx4090'"),
        ("a100", r"'a100' is not one device of the table; write one of: a100-40gb \(39.38 GiB\), "),
        ("V100", "v100-16gb .*v100-32gb"),
        ("rtx 4060 ti 8gb", "did you mean 'rtx4060ti-16gb'"),
        ("zx81", "'zx81' is not in the table of devices; write one of: cpu, .*mi355x"),
        ("", "'' is not in the table of devices"),
    ],
)
def test_an_unknown_name_is_answered_with_the_nearest(name: str, expected: str) -> None:
    with pytest.raises(InputError, match=expected) as caught:
        device(name)
    assert "\n" not in str(caught.value)


def test_the_place_of_the_fault_is_the_callers() -> None:
    with pytest.raises(InputError) as caught:
        device("h10O", where="bert.yaml:3", key="cluster.device")
    assert caught.value.faults[0].where == "bert.yaml:3" and caught.value.faults[0].key == "cluster.device"


def test_the_file_has_no_more_than_is_read() -> None:
    table = json.loads(Path(module.__file__).with_name("devices.json").read_text(encoding="utf-8"))
    assert set(table) == {"architectures", "devices"}
    assert {row["architecture"] for row in table["devices"].values()} == set(table["architectures"])
    assert all("source" in row for row in table["architectures"].values())
