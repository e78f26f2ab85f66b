"""A table of devices: memory, peak rates and links, so that a plan can be made for a device that is not here. No torch.

The numbers are in `devices.json`, each device with its source. Rates are dense (data sheets print those with sparsity,
twice as high), products accumulate in fp32 (on GeForce cards half the rate of fp16 accumulation), and are peaks: what a
step reaches of them is for the planner to say.
"""

from __future__ import annotations

import json
import re
from collections.abc import Mapping
from dataclasses import dataclass
from functools import cache
from pathlib import Path
from typing import Any, Literal

from bigtrain.errors import Fault, InputError, did_you_mean
from bigtrain.units import format_bytes

VENDOR_WORDS = re.compile(r"\b(nvidia|amd|tesla|geforce|quadro|instinct|generation)\b")
"""Left out of names before they are compared, like whatever is no letter or digit."""

MEMORY_TOLERANCE = 0.1
"""How far a device's memory may be from the table's, of it: drivers show 2% to 8% less than is built in."""


@dataclass(frozen=True)
class Device:
    """A kind of device and the machine that it is commonly in.

    `memory_known` tells where `memory_bytes` is from: `driver`, total memory as the driver gives it, printed with the
    device's name; `reported`, the same from out-of-memory messages, to 10 MiB; `nominal`, what is built in, of which up
    to 8% cannot be used. `flops_per_second` lacks precisions that the device has no instructions for; tf32 is the rate
    of fp32 products where those are allowed to round their operands. `host_bytes_per_second` is 0.8 of one direction of
    the link to the host, about what pinned copies reach (estimate). `peer_bytes_per_second` is one direction of NVLink
    or Infinity Fabric of one device, with `peer_devices` devices in reach; None and 1 where PCIe is all there is.
    `workspace_bytes` is what cuBLAS gets from torch's allocator at the first product on a stream, thus allocated and
    reserved (`parseChosenWorkspaceSize`, aten/src/ATen/cuda/CublasHandlePool.cpp; on Blackwell 8.125 MiB before pytorch
    pull request 175344, of February 2026); `context_bytes` is held outside of the allocator. A CPU's multiprocessors
    are its cores.
    """

    name: str
    kind: Literal["cpu", "cuda"]
    architecture: str
    multiprocessors: int
    memory_bytes: int
    memory_known: Literal["driver", "reported", "nominal"]
    flops_per_second: Mapping[str, float]
    memory_bytes_per_second: float
    pcie_generation: int | None
    pcie_lanes: int | None
    host_bytes_per_second: float | None
    peer_bytes_per_second: float | None
    peer_devices: int
    host_memory_bytes: int
    driver_names: tuple[str, ...]
    source: str
    capability: tuple[int, int] | None
    workspace_bytes: int
    context_bytes: int


@cache
def devices() -> Mapping[str, Device]:
    """Return every device of the table by name."""
    table = json.loads(Path(__file__).with_name("devices.json").read_text(encoding="utf-8"))
    return {name: _device(name, row, table["architectures"]) for name, row in table["devices"].items()}


def device(name: str, *, where: str = "command line", key: str = "--device") -> Device:
    """Return the device of this name, however it is spelled, or as the driver spells it.

    Raises InputError, with the nearest names, for one that is not in the table or that is several devices.
    """
    found = _by_key().get(_key(name), ())
    if len(found) == 1:
        return found[0]
    raise InputError(Fault(where, key, _unknown(name, [entry.name for entry in found])))


def device_of_driver(name: str, memory_bytes: int) -> Device | None:
    """Return the table's entry for a device of this machine, None where there is none.

    Variants of a card share a name and differ in memory; parts of a device (MIG) are no entry.
    """
    distances = {
        abs(1 - memory_bytes / entry.memory_bytes): entry for entry in _by_key().get(_key(name), ()) if memory_bytes
    }
    nearest = min(distances, default=1.0)
    return distances[nearest] if nearest <= MEMORY_TOLERANCE else None


def _device(name: str, row: dict[str, Any], architectures: dict[str, Any]) -> Device:
    architecture = architectures[row["architecture"]]
    capability = architecture["capability"]
    return Device(
        **{**row, "driver_names": tuple(row["driver_names"])},
        name=name,
        capability=tuple(capability) if capability else None,
        workspace_bytes=architecture["workspace_bytes"],
        context_bytes=architecture["context_bytes_per_multiprocessor"] * row["multiprocessors"],
    )


@cache
def _by_key() -> Mapping[str, tuple[Device, ...]]:
    found: dict[str, tuple[Device, ...]] = {}
    for entry in devices().values():
        for key in dict.fromkeys(map(_key, (entry.name, *entry.driver_names))):
            found[key] = (*found.get(key, ()), entry)
    return found


def _key(name: str) -> str:
    return re.sub(r"[^a-z0-9]", "", VENDOR_WORDS.sub("", name.lower().replace("_", " ")))


def _unknown(name: str, same: list[str]) -> str:
    """Say what is wrong with a name, and what to write instead."""
    key = _key(name)
    several = same or [known for known in devices() if key and _key(known).startswith(key)]
    if several:
        entries = ", ".join(f"{known} ({format_bytes(devices()[known].memory_bytes)})" for known in several)
        return f"{name!r} is not one device of the table; write one of: {entries}"
    nearest = did_you_mean(name, devices())
    return f"{name!r} is not in the table of devices{nearest or '; write one of: cpu, ' + ', '.join(devices())}"
