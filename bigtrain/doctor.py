"""What this machine has, what of it bigtrain will use, what is wrong, and what to do about it."""

from __future__ import annotations

import os
import platform
import shutil
import socket
import subprocess
import sys
from collections.abc import Iterator
from importlib import metadata
from pathlib import Path
from typing import NamedTuple

from bigtrain.config.schema import DataSection
from bigtrain.data.cache import cache_folder
from bigtrain.errors import InputError
from bigtrain.optim.kernels import nvidia_apex_present
from bigtrain.planner.hardware import cpu, cuda_devices
from bigtrain.units import format_bytes, format_flops
from bigtrain.world import check_told, world_of

PYTHONS = ((3, 11), (3, 13))
TORCHES = ((2, 11), (2, 13))
LITTLE_DISK_BYTES = 10 * 2**30

_RATE_SCRIPT = """
import torch
from pathlib import Path
from bigtrain.planner.hardware import this_machine
from bigtrain.training.peak import peak_flops
here = this_machine()
print(torch.cuda.is_available(), *(peak_flops(here, p, Path({cache!r})) for p in ("fp32", "bf16")))
"""


class Finding(NamedTuple):
    """One thing that was looked at; `mark` is `ok`, `--` (worth knowing) or `!!` (a fault)."""

    mark: str
    what: str
    text: str

    @property
    def is_fault(self) -> bool:
        return self.mark == "!!"


def examine() -> list[Finding]:
    """Look at everything; takes a few seconds, since torch is started and measured in a process of its own."""
    return [_python(), _torch(), *_devices(), _ranks(), _network(), *_libraries(), *_kernels(), *_room()]


def _python() -> Finding:
    fits = PYTHONS[0] <= sys.version_info[:2] <= PYTHONS[1]
    return Finding("ok" if fits else "!!", "Python", platform.python_version() + ("" if fits else "; use 3.11 to 3.13"))


def _torch() -> Finding:
    version = _version("torch")
    if version is None:
        return Finding("!!", "torch", "absent; pip install torch")
    release = tuple(int(part) for part in version.split("+")[0].split(".")[:2])
    fits = TORCHES[0] <= release <= TORCHES[1]
    return Finding("ok" if fits else "--", "torch", version + ("" if fits else "; tested with 2.11 to 2.13"))


def _devices() -> Iterator[Finding]:
    host, gpus = cpu(), cuda_devices()
    yield Finding(
        "ok", "CPU", f"{host.name}, {os.cpu_count()} cores, {format_bytes(host.memory_bytes)} for this process"
    )
    if gpus is None:
        yield Finding("--", "CUDA", "no device; train.device: auto means the CPU")
    else:
        yield Finding("ok", "CUDA", f"{gpus.devices} x {gpus.name}, {format_bytes(gpus.memory_bytes)} each")
    count, what = (gpus.devices, "one for each GPU") if gpus else (1, "a CPU runs any number that is written")
    yield Finding("ok", "processes", f"cluster.devices_per_node: auto means {count}; {what}")
    if _version("torch") is not None:
        yield from _measured(has_gpu=gpus is not None)


def _measured(*, has_gpu: bool) -> Iterator[Finding]:
    script = _RATE_SCRIPT.format(cache=str(cache_folder(DataSection())))
    ran = subprocess.run([sys.executable, "-c", script], capture_output=True, text=True, check=False)
    if ran.returncode:
        last_line = next(reversed(ran.stderr.strip().splitlines()), f"ended with exit code {ran.returncode}")
        yield Finding("!!", "torch starts", last_line)
        return
    sees_gpu, fp32, bf16 = ran.stdout.split()
    if has_gpu and sees_gpu != "True":
        yield Finding(
            "!!", "torch and CUDA", "the driver shows a device, torch does not; install a CUDA build of torch"
        )
    rates = f"fp32 {format_flops(float(fp32))}/s, bf16 {format_flops(float(bf16))}/s (measured; MFU is against it)"
    slow = float(bf16) < float(fp32)
    yield Finding("--" if slow else "ok", "matrix products", rates + ("; use amp.precision=fp32 here" if slow else ""))


def _ranks() -> Finding:
    """Return what the environment says of ranks: in an allocation, or a shell that a launcher has left, it may."""
    try:
        world = world_of(os.environ)
        if world is None:
            check_told(os.environ)
            return Finding("ok", "ranks", "none in the environment; bigtrain launch starts its own")
    except InputError as error:
        return Finding("!!", "ranks", str(error))
    place = f"rank {world.rank} of {world.size}, {world.local_size} on this machine"
    return Finding("--", "ranks", f"{place}, as the environment says; bigtrain launch is that one and starts no others")


def _network() -> Finding:
    """Return where this machine's name leads: gloo tells that to other nodes unless it is given an interface."""
    chosen, name = os.environ.get("GLOO_SOCKET_IFNAME"), socket.gethostname()
    if chosen is not None:
        there = {interface for _, interface in socket.if_nameindex()}
        absent = [each for each in chosen.split(",") if each not in there]
        fault = f"; there is no {absent[0]}, but {', '.join(sorted(there))}" if absent else ""
        return Finding("!!" if absent else "ok", "network", f"GLOO_SOCKET_IFNAME={chosen}{fault}")
    try:
        address = socket.gethostbyname(name)
        if not address.startswith("127."):
            return Finding("ok", "network", f"{name} is {address}; on one node ranks meet on loopback")
        found = f"{name} is {address}, which other nodes do not reach"
    except OSError as error:
        found = f"{name} has no address ({error.strerror})"
    use = "for several nodes under torchrun or srun set GLOO_SOCKET_IFNAME; cluster.rendezvous needs none"
    return Finding("--", "network", f"{found}; {use}")


def _libraries() -> Iterator[Finding]:
    for name in ("datasets", "tokenizers", "safetensors", "tensorboard"):
        version = _version(name)
        yield Finding("ok" if version else "!!", name, version or f"absent; pip install {name}")
    version = _version("transformers")
    yield Finding("ok" if version else "--", "transformers", version or "absent; needed for interoperation only")


def _kernels() -> Iterator[Finding]:
    fused = nvidia_apex_present() and cuda_devices() is not None
    text = "NVIDIA apex's fused kernel for LAMB in fp32 on CUDA" if fused else "bigtrain's own kernels for LAMB"
    yield Finding("ok", "optimizers", f"{text}; states in few bits (bf16, 8bit, 4bit) are bigtrain's own everywhere")
    attention = (
        "torch's variable-length attention" if cuda_devices() else "scaled_dot_product_attention, a document at a time"
    )
    yield Finding("ok", "attention", attention)


def _room() -> Iterator[Finding]:
    for what, folder in (("cache", cache_folder(DataSection())), ("runs", Path.cwd())):
        existing = next(parent for parent in (folder, *folder.parents) if parent.exists())
        free = shutil.disk_usage(existing).free
        fault = None if os.access(existing, os.W_OK) else f"; {existing} is not writable"
        little = "; little for checkpoints and data" if free < LITTLE_DISK_BYTES else ""
        mark = "!!" if fault else "--" if little else "ok"
        yield Finding(mark, what, f"{folder}, {format_bytes(free)} free{fault or little}")


def _version(package: str) -> str | None:
    try:
        return metadata.version(package)
    except metadata.PackageNotFoundError:
        return None
