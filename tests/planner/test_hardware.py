"""What this machine has, without torch."""

from __future__ import annotations

import os
from collections.abc import Iterator

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
