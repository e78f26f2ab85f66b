"""What this machine has, found without torch."""

from __future__ import annotations

import ctypes
import os
from dataclasses import dataclass
from pathlib import Path
from typing import Literal


@dataclass(frozen=True)
class Hardware:
    """Devices of one kind in one machine; `memory_bytes` is of one device, for a CPU what this process may use."""

    kind: Literal["cpu", "cuda"]
    name: str
    devices: int
    memory_bytes: int


def this_machine() -> Hardware:
    """Return the CUDA devices of this machine, or its CPU where there are none."""
    return cuda_devices() or cpu()


def cpu() -> Hardware:
    """Return this machine's processor and the memory that a process here may use."""
    return Hardware("cpu", _cpu_name(), 1, host_memory_bytes())


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
    return Hardware("cuda", name.value.decode(), count.value, size.value)


def host_memory_bytes() -> int:
    """Return the memory that a process here may use: the machine's, or its control group's if that is less."""
    machine = os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES")
    limits = (Path("/sys/fs/cgroup/memory.max"), Path("/sys/fs/cgroup/memory/memory.limit_in_bytes"))
    groups = [int(text) for limit in limits if limit.is_file() and (text := limit.read_text().strip()).isdigit()]
    return min([machine, *groups])


def _cpu_name() -> str:
    info = Path("/proc/cpuinfo")
    if info.is_file():
        for line in info.read_text(errors="replace").splitlines():
            if line.startswith("model name"):
                return line.partition(":")[2].strip()
    return "CPU"
