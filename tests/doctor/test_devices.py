"""Devices, driver, torch and NCCL, as they are on machines that this one is not."""

from __future__ import annotations

from pathlib import Path

import pytest

from bigtrain.doctor import devices
from bigtrain.doctor.devices import device_findings, torch_version
from bigtrain.doctor.finding import Finding, fault, ok
from bigtrain.doctor.probe import Probe
from bigtrain.planner.hardware import Hardware, of_name

H100 = of_name("h100")
TWO = Hardware("cuda", "a GPU", 2, 80 * 2**30, capability=(9, 0))
SEEN = Probe("13.0", "2.28.9", True, True, {"fp32": 5e13, "bf16": 7e14}, "bf16", 6.5e14)
PROCESSOR = Probe(None, None, False, False, {"fp32": 9e10, "bf16": 2e10}, "fp32", 8e10)
VERSION = "NVRM version: NVIDIA UNIX {} Module  580.65.06  Release Build  (builder@host)\nGCC version: 12.3.0\n"


def found(gpus: Hardware | None, probe: Probe | str | None) -> dict[str, Finding]:
    return {finding.what: finding for finding in device_findings(gpus, probe)}


@pytest.fixture(autouse=True)
def driver(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> Path:
    """Put a driver in place that runs CUDA up to 13.0; return the file that names it."""
    file = tmp_path / "version"
    file.write_text(VERSION.format("Open Kernel Module for x86_64 Kernel"))
    monkeypatch.setattr(devices, "DRIVER_FILE", file)
    monkeypatch.setattr(devices, "driver_cuda", lambda: "13.0")
    return file


@pytest.mark.parametrize(
    ("version", "state"), [("2.11.0", "ok"), ("2.13.0+cpu", "ok"), ("2.10.1", "note"), ("3.0.0a0", "note")]
)
def test_torch_versions(monkeypatch: pytest.MonkeyPatch, version: str, state: str) -> None:
    monkeypatch.setattr(devices, "version_of", lambda _name: version)
    assert torch_version().state == state


def test_no_torch_is_a_fault_and_nothing_more_is_said_of_it(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(devices, "version_of", lambda _name: None)
    assert torch_version() == fault("torch", "absent", "pip install torch")
    assert [*found(None, None)] == ["CPU", "driver", "CUDA", "processes"]


def test_a_machine_with_a_known_gpu_is_in_order() -> None:
    there = found(H100, SEEN)
    assert {finding.state for finding in there.values()} == {"ok"}
    assert there["driver"].text == "NVIDIA 580.65.06, runs CUDA up to 13.0"
    assert there["NCCL"] == ok("NCCL", "2.28.9, in torch")
    assert there["processes"].text == "cluster.devices_per_node: auto means 1; one for each GPU"
    assert there["speed"].text == "bf16 650 TFLOP/s over 2 s, 66% of the data sheet's 989 TFLOP/s"


def test_a_gpu_that_no_table_has_is_planned_by_one_that_is_said() -> None:
    there = found(TWO, SEEN)
    assert there["CUDA"].text == "2 x a GPU, 80.00 GiB each, not in the table of devices"
    assert there["CUDA"].do == "plans go by h100; measure with bigtrain profile"
    assert there["processes"].text == "cluster.devices_per_node: auto means 2; one for each GPU"
    assert "of the best measured here, 700 TFLOP/s" in there["speed"].text


@pytest.mark.parametrize("kind", ["x86_64 Kernel", "Open Kernel Module for aarch64 Kernel"])
def test_the_drivers_number_is_read_from_either_kind(driver: Path, kind: str) -> None:
    driver.write_text(VERSION.format(kind))
    assert found(H100, SEEN)["driver"].text.startswith("NVIDIA 580.65.06, ")


def test_no_driver_is_worth_knowing_and_half_of_one_is_a_fault(driver: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(devices, "driver_cuda", lambda: None)
    half = found(None, PROCESSOR)["driver"]
    assert half.is_fault
    assert "docker run --gpus all" in half.do
    driver.unlink()
    assert found(None, PROCESSOR)["driver"].state == "note"


@pytest.mark.parametrize(
    ("built", "newest", "do"),
    [
        (None, "13.0", "install a CUDA build of torch"),
        ("13.0", "12.4", "update the driver, which runs CUDA up to 12.4, or install a torch built for that"),
        ("12.8", "13.0", "look at CUDA_VISIBLE_DEVICES, and at what nvidia-smi says of the device"),
    ],
)
def test_a_gpu_that_torch_does_not_see_is_a_fault_with_a_way_out(
    monkeypatch: pytest.MonkeyPatch, built: str | None, newest: str, do: str
) -> None:
    monkeypatch.setattr(devices, "driver_cuda", lambda: newest)
    there = found(TWO, Probe(built, None, False, False, {}, "", 0.0))
    assert there["torch and CUDA"].is_fault
    assert there["torch and CUDA"].do == do
    assert "speed" not in there


def test_several_gpus_need_nccl_and_one_does_not() -> None:
    without = SEEN._replace(nccl=None)
    assert found(TWO, without)["NCCL"].is_fault
    assert found(H100, without)["NCCL"].state == "note"
    assert found(None, PROCESSOR)["NCCL"].text == "not used: ranks on CPUs talk over gloo"


def test_a_torch_that_does_not_start_is_a_fault() -> None:
    there = found(None, "ImportError: libc10.so: no such file")["torch starts"]
    assert there.is_fault
    assert there.text == "no: ImportError: libc10.so: no such file"
    assert there.do


def test_slow_bf16_and_a_device_that_is_held_back_are_said() -> None:
    there = found(None, PROCESSOR)
    assert there["matrix products"].do == "bf16 is the slower one here: use amp.precision=fp32"
    assert there["speed"].state == "ok"
    assert found(None, PROCESSOR._replace(lasting=2e10))["speed"].do.startswith("end what else runs here")
    held = found(H100, SEEN._replace(lasting=2e14))["speed"]
    assert (held.state, "nvidia-smi" in held.do) == ("note", True)


def test_a_machine_without_a_driver_runs_no_cuda(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.undo()

    def absent(_name: str) -> None:
        raise OSError

    monkeypatch.setattr(devices.ctypes, "CDLL", absent)
    assert devices.driver_cuda() is None


def test_the_newest_cuda_is_what_the_driver_says(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.undo()

    class Driver:
        def cuDriverGetVersion(self, number: object) -> int:
            number._obj.value = 12040  # type: ignore[attr-defined]
            return 0

    monkeypatch.setattr(devices.ctypes, "CDLL", lambda _name: Driver())
    assert devices.driver_cuda() == "12.4"
