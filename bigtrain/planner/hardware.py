"""What this machine has, found without torch."""

from __future__ import annotations

import ctypes
import os
from dataclasses import dataclass
from pathlib import Path
from typing import Literal

from bigtrain.planner.devices import Device, device_of_driver
from bigtrain.planner.devices import device as table_device
from bigtrain.processor import has_slow_bf16, processor_field


@dataclass(frozen=True)
class Hardware:
    """Devices of one kind in one machine; `memory_bytes` is of one device, for a CPU what this process may use.

    `slow_bf16` says that matrix products in bf16 are slower than in fp32, as on processors without instructions for it;
    `capability` is a CUDA device's compute capability, where that is known. `device` is the table's row for it, None
    where it has none. `threads` are what torch computes with on a CPU; None: as many as it starts here.
    """

    kind: Literal["cpu", "cuda"]
    name: str
    devices: int
    memory_bytes: int
    slow_bf16: bool = False
    capability: tuple[int, int] | None = None
    device: Device | None = None
    threads: int | None = None


def of_name(name: str) -> Hardware:
    """Return a device of the table by its name, or this machine's `cpu`. Raises InputError, with the nearest names."""
    if name == "cpu":
        return cpu()
    found = table_device(name)
    return Hardware(
        found.kind,
        found.name,
        1,
        found.memory_bytes,
        slow_bf16="bf16" not in found.flops_per_second,
        capability=found.capability,
        device=found,
        threads=found.multiprocessors if found.kind == "cpu" else None,
    )


def this_machine() -> Hardware:
    """Return the CUDA devices of this machine, or its CPU where there are none."""
    return cuda_devices() or cpu()


def cpu() -> Hardware:
    """Return this machine's processor and the memory that a process here may use."""
    return Hardware("cpu", processor_field("model name") or "CPU", 1, host_memory_bytes(), slow_bf16=has_slow_bf16())


def cuda_devices() -> Hardware | None:
    """Return the CUDA devices that the driver shows, or None where there is no driver or no device."""
    try:
        driver = ctypes.CDLL("libcuda.so.1")
    except OSError:
        return None
    count = ctypes.c_int()
    if driver.cuInit(0) or driver.cuDeviceGetCount(ctypes.byref(count)) or not count.value:
        return None
    device, name, size = ctypes.c_int(), ctypes.create_string_buffer(128), ctypes.c_size_t()
    driver.cuDeviceGet(ctypes.byref(device), 0)
    driver.cuDeviceGetName(name, len(name), device)
    driver.cuDeviceTotalMem_v2(ctypes.byref(size), device)
    text, memory_bytes = name.value.decode(), size.value
    return Hardware(
        "cuda",
        text,
        count.value,
        memory_bytes,
        capability=_capability(driver, device),
        device=device_of_driver(text, memory_bytes),
    )


def _capability(driver: ctypes.CDLL, device: ctypes.c_int) -> tuple[int, int]:
    """Return a device's compute capability: attributes 75 and 76 of cuDeviceGetAttribute (CUDA driver API)."""
    parts = [ctypes.c_int(), ctypes.c_int()]
    for attribute, part in enumerate(parts, 75):
        driver.cuDeviceGetAttribute(ctypes.byref(part), attribute, device)
    return parts[0].value, parts[1].value


def host_memory_bytes() -> int:
    """Return the memory that a process here may use: the machine's, or its control group's if that is less."""
    machine = os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES")
    limits = (Path("/sys/fs/cgroup/memory.max"), Path("/sys/fs/cgroup/memory/memory.limit_in_bytes"))
    groups = [int(text) for limit in limits if limit.is_file() and (text := limit.read_text().strip()).isdigit()]
    return min([machine, *groups])
