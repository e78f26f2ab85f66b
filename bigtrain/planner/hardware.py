"""What this machine has, found without torch."""

from __future__ import annotations

import ctypes
import os
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Literal

from bigtrain.planner.devices import Device, device_of_driver, devices
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
    found = [limit.read_text().strip() for limit in _group_limits(CONTROL_GROUPS, OWN_GROUPS) if limit.is_file()]
    return min([machine, *(int(text) for text in found if text.isdigit())])


CONTROL_GROUPS, OWN_GROUPS = Path("/sys/fs/cgroup"), Path("/proc/self/cgroup")


def _group_limits(root: Path, own: Path) -> Iterator[Path]:
    """Yield where the limits of this process's control group and of those around it would be: cgroups(7), 2 and 1.

    A scheduler's limit is on a group below the root; inside a container, the root is the container's own group.
    """
    lines = own.read_text().splitlines() if own.is_file() else []
    for hierarchy, controllers, path in (line.split(":", 2) for line in ["0::/", ":memory:/", *lines]):
        folder, file = root, "memory.max"
        if hierarchy != "0":
            if "memory" not in controllers.split(","):
                continue
            folder, file = root / "memory", "memory.limit_in_bytes"
        inside = Path(path.lstrip("/"))
        yield from (folder / group / file for group in (inside, *inside.parents))


def row_of(hardware: Hardware) -> Device:
    """Return the table's row of a CUDA device, or that of its capability whose memory is nearest."""
    if hardware.device is not None:
        return hardware.device
    rows = [row for row in devices().values() if row.kind == "cuda"]
    alike = [row for row in rows if row.capability == hardware.capability] or rows
    return min(alike, key=lambda row: abs(row.memory_bytes - hardware.memory_bytes))
