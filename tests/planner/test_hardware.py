"""What this machine has, without torch."""

from __future__ import annotations

import os
from collections.abc import Iterator
from pathlib import Path

import pytest
import torch

from bigtrain import processor
from bigtrain.errors import InputError
from bigtrain.planner import hardware


def test_the_cpu_has_a_name_and_no_more_memory_than_the_machine() -> None:
    here = hardware.cpu()
    assert here.kind == "cpu"
    assert here.name
    assert here.devices == 1
    assert 0 < here.memory_bytes <= os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES")


def test_cuda_is_what_torch_sees_or_more() -> None:
    found = hardware.cuda_devices()
    if torch.cuda.is_available():
        assert found is not None
        assert found.devices == torch.cuda.device_count()
        assert found.memory_bytes == torch.cuda.get_device_properties(0).total_memory


def test_this_machine_prefers_cuda(monkeypatch: pytest.MonkeyPatch) -> None:
    gpu = hardware.Hardware("cuda", "x", 2, 1)
    monkeypatch.setattr(hardware, "cuda_devices", lambda: gpu)
    assert hardware.this_machine() is gpu
    monkeypatch.setattr(hardware, "cuda_devices", lambda: None)
    assert hardware.this_machine().kind == "cpu"


def test_a_driver_without_a_device_is_none(monkeypatch: pytest.MonkeyPatch) -> None:
    class Driver:
        def cuInit(self, _flags: int) -> int:
            return 100

    monkeypatch.setattr(hardware.ctypes, "CDLL", lambda _name: Driver())
    assert hardware.cuda_devices() is None


def test_no_driver_is_none(monkeypatch: pytest.MonkeyPatch) -> None:
    def absent(_name: str) -> None:
        raise OSError

    monkeypatch.setattr(hardware.ctypes, "CDLL", absent)
    assert hardware.cuda_devices() is None


@pytest.fixture
def fresh() -> Iterator[None]:
    """Forget what the processor can do, before and after."""
    processor.has_slow_bf16.cache_clear()
    yield
    processor.has_slow_bf16.cache_clear()


@pytest.mark.parametrize(
    ("flags", "slow"),
    [("fpu avx2 avx512f", True), ("fpu avx512f avx512_bf16", False), ("fpu amx_bf16", False), ("", False)],
)
def test_bf16_is_slow_where_the_processor_lists_no_instructions_for_it(
    monkeypatch: pytest.MonkeyPatch, fresh: None, flags: str, slow: bool
) -> None:
    monkeypatch.setattr(processor, "processor_field", lambda name: flags if name == "flags" else "")
    monkeypatch.setattr(hardware, "processor_field", lambda name: "")
    assert hardware.cpu().slow_bf16 is slow
    assert hardware.cpu().name == "CPU"


def test_a_device_of_the_table_by_name() -> None:
    found = hardware.of_name("NVIDIA H100 80GB HBM3")
    assert (found.kind, found.name, found.devices, found.capability) == ("cuda", "h100", 1, (9, 0))
    assert found.device is not None and found.memory_bytes == found.device.memory_bytes
    assert not found.slow_bf16 and found.threads is None


def test_devices_without_bf16_are_slow_at_it() -> None:
    assert hardware.of_name("t4").slow_bf16
    assert hardware.of_name("cpu-laptop").slow_bf16 and hardware.of_name("cpu-laptop").threads == 4


def test_cpu_is_this_machine() -> None:
    assert hardware.of_name("cpu") == hardware.cpu()
    assert hardware.of_name("cpu").device is None


def test_a_name_that_is_not_there_gets_the_nearest() -> None:
    with pytest.raises(InputError, match=r"--device: 'h10' is not one device of the table; write one of: h100"):
        hardware.of_name("h10")
    with pytest.raises(InputError, match="did you mean 'rtx4090'"):
        hardware.of_name("rtx409o")


def test_a_device_that_is_not_in_the_table_has_a_nearest_row() -> None:
    slice_of_h100 = hardware.Hardware("cuda", "NVIDIA H100 MIG 3g.40gb", 1, 40 * 2**30, capability=(9, 0))
    assert hardware.row_of(slice_of_h100).capability == (9, 0)
    assert hardware.row_of(hardware.of_name("t4")) is hardware.of_name("t4").device


@pytest.mark.parametrize(
    ("own", "limits", "expected"),
    [
        ("0::/\n", {"memory.max": "1000"}, 1000),
        ("0::/system.slice/slurmstepd.scope/job_7\n", {"system.slice/slurmstepd.scope/memory.max": "2000"}, 2000),
        ("0::/a/b\n", {"a/memory.max": "3000", "a/b/memory.max": "max"}, 3000),
        ("5:cpu,memory:/docker/x\n", {"memory/docker/x/memory.limit_in_bytes": "4000"}, 4000),
        ("", {"memory.max": "5000"}, 5000),
        ("0::/a\n", {}, None),
    ],
)
def test_a_control_groups_limit_counts(
    own: str, limits: dict[str, str], expected: int | None, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    (tmp_path / "cgroup").write_text(own)
    for name, text in limits.items():
        file = tmp_path / "fs" / name
        file.parent.mkdir(parents=True, exist_ok=True)
        file.write_text(text + "\n")
    monkeypatch.setattr(hardware, "CONTROL_GROUPS", tmp_path / "fs")
    monkeypatch.setattr(hardware, "OWN_GROUPS", tmp_path / "cgroup")
    machine = os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES")
    assert hardware.host_memory_bytes() == (expected or machine)
