"""What this machine has, found without torch."""

from __future__ import annotations

import ctypes
import os
from dataclasses import dataclass
from pathlib import Path
from typing import Literal


@dataclass(frozen=True)
class Hardware:
    """Devices of one kind in one machine; `memory_bytes` is of one device, for a CPU what this process may use.

    `slow_bf16` says that matrix products in bf16 are slower than in fp32, as on processors without instructions for it.
    """

    kind: Literal["cpu", "cuda"]
    name: str
    devices: int
    memory_bytes: int
    slow_bf16: bool = False


def this_machine() -> Hardware:
    """Return the CUDA devices of this machine, or its CPU where there are none."""
    return cuda_devices() or cpu()


def cpu() -> Hardware:
    """Return this machine's processor and the memory that a process here may use."""
    return Hardware("cpu", _cpu_field("model name") or "CPU", 1, host_memory_bytes(), slow_bf16=_has_slow_bf16())


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


def _has_slow_bf16() -> bool:
    """Tell whether this is an x86 processor that has no bf16 instructions; of other kinds nothing is known."""
    flags = _cpu_field("flags").split()
    return bool(flags) and not {"avx512_bf16", "amx_bf16"} & set(flags)


def _cpu_field(name: str) -> str:
    """Return a field of the first processor that Linux lists, or an empty text."""
    info = Path("/proc/cpuinfo")
    lines = info.read_text(errors="replace").splitlines() if info.is_file() else []
    return next((line.partition(":")[2].strip() for line in lines if line.startswith(name)), "")
