"""What a recipe without `auto` holds on some hardware: tensors, allocator, process, device. No torch."""

from __future__ import annotations

import dataclasses

from bigtrain.config.model import ModelConfig
from bigtrain.config.schema import Recipe
from bigtrain.memory.predict import predict
from bigtrain.memory.report import MemoryReport
from bigtrain.memory.state import host_bytes, saved_bytes
from bigtrain.planner.hardware import Hardware, row_of

PROCESS_BYTES = {"cpu": 400 * 2**20, "cuda": 3 * 2**30}
"""Resident host memory of a launcher, its worker and the reader of data, beside tensors.

On the CPU measured: 380 and 382 MiB (a BERT and a GPT of 14M parameters, from outside). With CUDA's libraries an
estimate, not measured.
"""

SHARDING_BYTES = 72 * 2**20
"""What a rank of several has resident besides, on a CPU: torch's sharding, and its compiler, which that loads."""

COMMUNICATION_BYTES = 512 * 2**20
"""What NCCL holds on a device beside the allocator, from two ranks on: an estimate, not measured."""


def memory_of(recipe: Recipe, model: ModelConfig, hardware: Hardware, world_size: int = 1) -> MemoryReport:
    """Return the memory of one rank at its peak; on a CPU no allocator lies between, and the device is the host."""
    report = predict(
        recipe,
        model,
        device=hardware.kind,
        slow_bf16=hardware.slow_bf16,
        world_size=world_size,
        threads=hardware.threads,
        workspace_bytes=workspace_bytes(hardware),
    )
    held = 0  # on a CPU the prediction has it there, and a checkpoint is written without a copy
    if hardware.kind != "cpu":
        copied = saved_bytes(recipe, model, world_size) if recipe.checkpoint.asynchronous else 0
        held = host_bytes(recipe, model, world_size) + copied
    return on_device(dataclasses.replace(report, host_bytes_peak=held), hardware, world_size)


def on_device(report: MemoryReport, hardware: Hardware, world_size: int = 1) -> MemoryReport:
    """Return a report of tensors and allocator with what a device and its host hold in all."""
    held = report.allocated_bytes_peak
    beside = beside_bytes(hardware, world_size)
    if hardware.kind == "cpu":
        process = beside + (report.host_bytes_peak or 0)
        return dataclasses.replace(
            report, reserved_bytes_peak=held, device_bytes_peak=held + beside, host_bytes_peak=held + process
        )
    process = PROCESS_BYTES["cuda"] + (report.host_bytes_peak or 0)
    reserved = report.reserved_bytes_peak
    assert reserved is not None
    return dataclasses.replace(report, device_bytes_peak=reserved + beside, host_bytes_peak=process)


def beside_bytes(hardware: Hardware, world_size: int = 1) -> int:
    """Return what a device holds beside tensors and what the allocator reserves for them."""
    if hardware.kind == "cpu":
        return PROCESS_BYTES["cpu"] + (SHARDING_BYTES if world_size > 1 else 0)
    return row_of(hardware).context_bytes + (COMMUNICATION_BYTES if world_size > 1 else 0)


def workspace_bytes(hardware: Hardware) -> int:
    """Return what the library of matrix products takes of the allocator, for each thread that calls it."""
    return row_of(hardware).workspace_bytes if hardware.kind == "cuda" else 0


def budget_bytes(hardware: Hardware) -> int:
    """Return what `memory.budget: auto` may use: all but a headroom, of a nominal size what drivers show."""
    known = hardware.device is None or hardware.device.memory_known != "nominal" or hardware.kind == "cpu"
    return int(hardware.memory_bytes * (1 if known else VISIBLE_SHARE) * (1 - HEADROOM_SHARE))


HEADROOM_SHARE = 0.03
"""Left free: what the prediction may be wrong by, and what else lives on a device."""

VISIBLE_SHARE = 0.95
"""Of a card's nominal memory, what its driver shows: 92% to 98% (`devices.json`)."""
