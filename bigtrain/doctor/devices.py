"""The devices, and whether the driver, torch and NCCL go together with them."""

from __future__ import annotations

import ctypes
import os
import re
from collections.abc import Iterator
from importlib import metadata
from pathlib import Path

from bigtrain.doctor.finding import Finding, fault, note, ok
from bigtrain.doctor.probe import Probe
from bigtrain.planner.hardware import Hardware, cpu, row_of
from bigtrain.units import format_bytes, format_flops

TORCHES = ((2, 11), (2, 13))
DRIVER_FILE = Path("/proc/driver/nvidia/version")
SLOW_SHARE = 0.5
"""Of the device's peak: below, something holds it back. Large products reach 0.6 to 0.8 of a data sheet's number."""


def torch_version() -> Finding:
    """Return whether torch is there, and one that was tested."""
    version = version_of("torch")
    if version is None:
        return fault("torch", "absent", "pip install torch")
    release = tuple(int(part) for part in re.findall(r"\d+", version)[:2])
    if TORCHES[0] <= release <= TORCHES[1]:
        return ok("torch", version)
    return note("torch", version, "bigtrain is tested with 2.11 to 2.13: pip install 'torch>=2.11,<2.14'")


def device_findings(gpus: Hardware | None, probe: Probe | str | None) -> Iterator[Finding]:
    """Look at what computes: `probe` is what torch says, why it does not start, or None where there is none."""
    yield ok("CPU", f"{cpu().name}, {os.cpu_count()} cores")
    yield _driver(gpus)
    yield _cuda(gpus)
    count, what = (gpus.devices, "one for each GPU") if gpus else (1, "a CPU runs any number that is written")
    yield ok("processes", f"cluster.devices_per_node: auto means {count}; {what}")
    if isinstance(probe, str):
        yield fault("torch starts", f"no: {probe}", "install torch anew: pip install --force-reinstall torch")
    elif probe is not None:
        yield from _seen(gpus, probe)


def _seen(gpus: Hardware | None, probe: Probe) -> Iterator[Finding]:
    if gpus is not None and not probe.sees_gpu:
        yield _unseen(probe)
        return
    yield _nccl(gpus, probe)
    yield _products(probe)
    yield _speed(gpus or cpu(), probe)


def _driver(gpus: Hardware | None) -> Finding:
    text = DRIVER_FILE.read_text(errors="replace") if DRIVER_FILE.is_file() else ""
    number = re.search(r"Kernel Module\D*?(?:x86_64|aarch64)?\s+(\d+(?:\.\d+)+)", text)
    name = f"NVIDIA {number[1]}" if number else "NVIDIA"
    newest = driver_cuda()
    if newest is not None:
        return ok("driver", f"{name}, runs CUDA up to {newest}")
    if number:
        do = "in a container: docker run --gpus all, with the NVIDIA container toolkit; on the host: install libcuda"
        return fault("driver", f"{name} is loaded, but libcuda.so.1 cannot be", do)
    return note("driver", "no NVIDIA driver", "none is needed on a CPU; for a GPU install NVIDIA's driver")


def driver_cuda() -> str | None:
    """Return the newest CUDA that the driver runs, as `cuDriverGetVersion` says; None without a driver."""
    number = ctypes.c_int()
    try:
        failed = ctypes.CDLL("libcuda.so.1").cuDriverGetVersion(ctypes.byref(number))
    except OSError:
        return None
    return None if failed else f"{number.value // 1000}.{number.value % 1000 // 10}"


def _cuda(gpus: Hardware | None) -> Finding:
    if gpus is None:
        return note("CUDA", "no device", "train.device: auto means the CPU; in a container: docker run --gpus all")
    text = f"{gpus.devices} x {gpus.name}, {format_bytes(gpus.memory_bytes)} each"
    if gpus.device is not None:
        return ok("CUDA", text)
    known = row_of(gpus).name
    return note("CUDA", f"{text}, not in the table of devices", f"plans go by {known}; measure with bigtrain profile")


def _unseen(probe: Probe) -> Finding:
    """Return why torch sees no device where the driver does."""
    what, newest = "torch and CUDA", driver_cuda()
    if probe.cuda is None:
        return fault(what, "the driver shows a device, and this torch is for CPUs", "install a CUDA build of torch")
    text = f"the driver shows a device, torch (built for CUDA {probe.cuda}) does not"
    if newest is not None and _numbers(newest) < _numbers(probe.cuda):
        do = f"update the driver, which runs CUDA up to {newest}, or install a torch built for that"
        return fault(what, text, do)
    return fault(what, text, "look at CUDA_VISIBLE_DEVICES, and at what nvidia-smi says of the device")


def _nccl(gpus: Hardware | None, probe: Probe) -> Finding:
    if gpus is None:
        return ok("NCCL", "not used: ranks on CPUs talk over gloo")
    if probe.nccl is not None:
        return ok("NCCL", f"{probe.nccl}, in torch")
    do = "install torch's own build, which brings it"
    return (fault if gpus.devices > 1 else note)("NCCL", "not in this torch; several GPUs need it", do)


def _products(probe: Probe) -> Finding:
    rates = ", ".join(f"{name} {format_flops(rate)}/s" for name, rate in probe.best.items())
    text = f"{rates} (the best measured here; MFU is against it)"
    if probe.best["bf16"] >= probe.best["fp32"]:
        return ok("matrix products", text)
    return note("matrix products", text, "bf16 is the slower one here: use amp.precision=fp32")


def _speed(here: Hardware, probe: Probe) -> Finding:
    """Return the rate over two seconds beside the peak: the data sheet's, or the best that was ever measured here."""
    sheet = 0.0 if here.device is None else here.device.flops_per_second.get(probe.precision, 0.0)
    peak, whose = (sheet, "the data sheet's") if sheet else (probe.best[probe.precision], "the best measured here,")
    share = probe.lasting / peak
    rate, of = format_flops(probe.lasting), format_flops(peak)
    text = f"{probe.precision} {rate}/s over 2 s, {share:.0%} of {whose} {of}/s"
    if share >= SLOW_SHARE:
        return ok("speed", text)
    gpu = "look at nvidia-smi -q -d PERFORMANCE for other processes, heat, a power limit"
    return note("speed", text, gpu if here.kind == "cuda" else "end what else runs here, or give it more cores")


def _numbers(version: str) -> tuple[int, ...]:
    return tuple(map(int, version.split(".")))


def version_of(package: str) -> str | None:
    """Return the version of an installed package."""
    try:
        return metadata.version(package)
    except metadata.PackageNotFoundError:
        return None
