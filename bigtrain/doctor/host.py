"""What a run needs of the machine beside its devices: Python, memory, disks, limits."""

from __future__ import annotations

import os
import platform
import resource
import shutil
import sys
from collections.abc import Iterator
from pathlib import Path

from bigtrain.config.schema import DataSection
from bigtrain.data.cache import cache_folder
from bigtrain.doctor.finding import Finding, fault, note, ok
from bigtrain.planner.hardware import cpu
from bigtrain.units import format_bytes

PYTHONS = ((3, 11), (3, 13))
LITTLE_DISK_BYTES = 10 * 2**30
LITTLE_MEMORY_BYTES = 4 * 2**30
LITTLE_SHARED_BYTES = 2**30
"""Of /dev/shm, through which NCCL connects GPUs of a machine that have no direct link."""
FEW_FILES = 1024
MEMORY_INFO, SHARED_MEMORY = Path("/proc/meminfo"), Path("/dev/shm")


def host_findings(gpus: int) -> Iterator[Finding]:
    """Look at the machine, which has so many GPUs."""
    yield _python()
    yield _memory()
    yield from _room()
    yield _locked_memory(gpus)
    yield _shared_memory(gpus)
    yield _open_files()


def _python() -> Finding:
    version = platform.python_version()
    if PYTHONS[0] <= sys.version_info[:2] <= PYTHONS[1]:
        return ok("Python", version)
    return fault("Python", version, "use Python 3.11 to 3.13")


def _memory() -> Finding:
    """Return what this process may use of the host's memory, and what others leave of it."""
    host, free = cpu(), _available_bytes()
    text = f"{format_bytes(host.memory_bytes)} for this process"
    if free is None:
        return ok("host memory", text)
    text += f", {format_bytes(free)} of the machine's free"
    if min(host.memory_bytes, free) >= LITTLE_MEMORY_BYTES:
        return ok("host memory", text)
    return note("host memory", text, "end what else runs here, or raise the limit of the container or the job")


def _available_bytes() -> int | None:
    """Return MemAvailable of proc_meminfo(5), None where there is no such thing."""
    lines = MEMORY_INFO.read_text().splitlines() if MEMORY_INFO.is_file() else []
    found = [line.split()[1] for line in lines if line.startswith("MemAvailable:")]
    return int(found[0]) * 1024 if found else None


def _room() -> Iterator[Finding]:
    for what, folder, other in (
        ("cache", cache_folder(DataSection()), "set BIGTRAIN_CACHE to another folder"),
        ("runs", Path.cwd(), "start in another folder, or name one with --run-dir"),
    ):
        existing = next(parent for parent in (folder, *folder.parents) if parent.exists())
        free = shutil.disk_usage(existing).free
        text = f"{folder}, {format_bytes(free)} free"
        if not os.access(existing, os.W_OK):
            yield fault(what, f"{text}; {existing} is not writable", other)
        elif free < LITTLE_DISK_BYTES:
            yield note(what, f"{text}, which is little for checkpoints and data", f"make room, or {other}")
        else:
            yield ok(what, text)


def _locked_memory(gpus: int) -> Finding:
    """Return how much memory may be locked: network cards read it where it lies (RDMA)."""
    limit = resource.getrlimit(resource.RLIMIT_MEMLOCK)[0]
    text = "unlimited" if limit == resource.RLIM_INFINITY else format_bytes(limit)
    if limit == resource.RLIM_INFINITY or not gpus:
        return ok("locked memory", f"{text} (ulimit -l){'' if gpus else '; only network cards beside GPUs need it'}")
    do = "for several nodes over InfiniBand or RoCE: ulimit -l unlimited, docker run --ulimit memlock=-1"
    return note("locked memory", f"{text} (ulimit -l)", do)


def _shared_memory(gpus: int) -> Finding:
    """Return the size of /dev/shm, where NCCL's ranks of a machine exchange what no direct link carries."""
    try:
        size = shutil.disk_usage(SHARED_MEMORY).total
    except OSError:
        size = 0
    text = f"{SHARED_MEMORY} has {format_bytes(size)}" if size else f"no {SHARED_MEMORY}"
    if gpus < 2:
        return ok("shared memory", f"{text}; only several GPUs need it")
    if size >= LITTLE_SHARED_BYTES:
        return ok("shared memory", text)
    return note(
        "shared memory",
        f"{text}, which NCCL may find too little for {gpus} GPUs",
        "docker run --shm-size=8g; in Kubernetes an emptyDir of medium Memory there",
    )


def _open_files() -> Finding:
    limit = resource.getrlimit(resource.RLIMIT_NOFILE)[0]
    text = "unlimited" if limit == resource.RLIM_INFINITY else f"{limit:,} at a time"
    if limit == resource.RLIM_INFINITY or limit >= FEW_FILES:
        return ok("open files", f"{text} (ulimit -n)")
    return note("open files", f"{text} (ulimit -n)", "data of many shards need more: ulimit -n 65536")
