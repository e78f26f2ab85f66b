"""Device and host bytes on top of the tensors', and what a budget may be."""

from __future__ import annotations

import dataclasses

import pytest

from bigtrain.config.load import load_recipe
from bigtrain.memory.predict import predict
from bigtrain.planner.choice import Choice
from bigtrain.planner.devices import device, devices
from bigtrain.planner.hardware import Hardware, of_name
from bigtrain.planner.price import (
    COMMUNICATION_BYTES,
    HEADROOM_SHARE,
    PROCESS_BYTES,
    VISIBLE_SHARE,
    budget_bytes,
    memory_of,
)
from bigtrain.planner.settle import settled

PLAIN = Choice(micro_batch_size=4, accumulation_steps=2, recompute=("none", "none"))


def priced(hardware: Hardware, world_size: int = 1, choice: Choice = PLAIN):
    rows = f"train.global_batch_size={choice.micro_batch_size * choice.accumulation_steps * world_size}"
    recipe, model, _, ranks = settled(load_recipe("quickstart_bert", [rows]), hardware, world_size)
    resolved = choice.into(recipe)
    return memory_of(resolved, model, hardware, ranks), resolved, model


def test_on_a_cpu_the_device_is_the_host() -> None:
    report, recipe, model = priced(of_name("cpu-laptop"))
    plain = predict(recipe, model, device="cpu", slow_bf16=True, threads=4)
    assert report.by_cause == plain.by_cause
    assert report.reserved_bytes_peak == report.allocated_bytes_peak
    assert report.device_bytes_peak == report.host_bytes_peak == report.allocated_bytes_peak + PROCESS_BYTES["cpu"]


def test_threads_are_the_devices_own() -> None:
    few, many = (of_name(name) for name in ("cpu-laptop", "cpu-server"))
    assert few.threads == 4 and many.threads == 64
    for hardware in (few, many):
        report, recipe, model = priced(hardware)
        same = predict(recipe, model, device="cpu", slow_bf16=hardware.slow_bf16, threads=hardware.threads)
        assert report.by_cause == same.by_cause


@pytest.mark.parametrize("name", ["t4", "rtx4090", "h100"])
def test_on_cuda_allocator_and_context_come_on_top(name: str) -> None:
    hardware = of_name(name)
    report, _, _ = priced(hardware)
    assert hardware.device is not None and report.reserved_bytes_peak is not None
    assert report.allocated_bytes_peak <= report.reserved_bytes_peak
    assert report.reserved_bytes_peak <= report.allocated_bytes_peak + 128 * 2**20
    assert report.device_bytes_peak == report.reserved_bytes_peak + hardware.device.context_bytes
    assert report.by_cause["temporaries"] >= 2 * hardware.device.workspace_bytes


def test_more_than_one_rank_communicates() -> None:
    hardware = of_name("h100")
    alone, together = priced(hardware)[0], priced(hardware, 2)[0]
    assert together.device_bytes_peak is not None and alone.device_bytes_peak is not None
    assert together.device_bytes_peak >= alone.device_bytes_peak + COMMUNICATION_BYTES


def test_a_device_that_the_table_lacks_is_priced_as_the_nearest() -> None:
    h100 = of_name("h100")
    unknown = dataclasses.replace(h100, name="a slice", device=None)
    assert priced(unknown)[0] == priced(h100)[0]


def test_the_budget_of_a_device() -> None:
    h100 = of_name("h100")
    nominal = next(of_name(row.name) for row in devices().values() if row.kind == "cuda" and not exact(row.name))
    assert budget_bytes(h100) == int(h100.memory_bytes * (1 - HEADROOM_SHARE))
    assert budget_bytes(nominal) == int(nominal.memory_bytes * VISIBLE_SHARE * (1 - HEADROOM_SHARE))
    laptop = of_name("cpu-laptop")
    assert budget_bytes(laptop) == int(laptop.memory_bytes * (1 - HEADROOM_SHARE))


def exact(name: str) -> bool:
    return device(name).memory_known != "nominal"
