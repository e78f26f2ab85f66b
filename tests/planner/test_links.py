"""Seconds of sending: what is near is fast, what hides behind work is free, and a CPU hides nothing."""

from __future__ import annotations

import dataclasses
from typing import Any

import pytest

from bigtrain.config.schema import Recipe
from bigtrain.planner.devices import devices
from bigtrain.planner.hardware import of_name
from bigtrain.planner.links import Links, communication, links_of
from bigtrain.planner.rates import constants
from bigtrain.sharding.cost import Collective, collectives

LINKS = Links(1e11, 1e10, 2e10, 8, overlapping=True)


def recipe(**cluster: Any) -> Recipe:
    return Recipe.model_validate(
        {
            "name": "tiny",
            "model": {"family": "gpt", "hidden_size": 32, "num_hidden_layers": 2, "num_attention_heads": 2},
            "train": {"objective": "clm", "steps": 10},
            "optimizer": {"learning_rate": 1e-2},
            "cluster": cluster,
        }
    )


def gather(ranks: int = 8, scope: Any = "shard", times: int = 1) -> Collective:
    return Collective("all_gather", 10**10, ranks, scope, times, 0.5)


@pytest.mark.parametrize("name", sorted(devices()))
def test_every_device_has_links(name: str) -> None:
    found = links_of(of_name(name), recipe())
    assert found.near_bytes_per_second > 0
    assert found.far_bytes_per_second > 0
    assert found.host_bytes_per_second > 0
    assert found.neighbours >= 1


def test_nvlink_is_faster_than_pcie_and_the_network() -> None:
    h100, l40s = (links_of(of_name(name), recipe()) for name in ("h100", "l40s"))
    assert h100.near_bytes_per_second > h100.far_bytes_per_second
    assert h100.near_bytes_per_second > l40s.near_bytes_per_second
    assert h100.neighbours == 8


def test_processes_on_one_cpu_are_neighbours_and_on_several_not() -> None:
    laptop = of_name("cpu-laptop")
    assert links_of(laptop, recipe()).neighbours > 4096
    assert links_of(laptop, recipe(nodes=2)).neighbours == 1
    assert not links_of(laptop, recipe()).overlapping


def test_the_recipe_says_how_many_devices_a_machine_has() -> None:
    assert links_of(of_name("h100"), recipe(nodes=2, devices_per_node=4)).neighbours == 4
    assert links_of(of_name("l40s"), recipe(nodes=2, devices_per_node=2)).neighbours == 2


def test_a_gpu_that_nobody_knows_has_links_too() -> None:
    strange = dataclasses.replace(of_name("h100"), device=None)
    assert links_of(strange, recipe()).host_bytes_per_second == constants()["links"]["local_bytes_per_second"]


@pytest.mark.parametrize(
    ("ranks", "scope", "world_size", "near"),
    [(8, "shard", 8, True), (8, "shard", 64, True), (64, "shard", 64, False), (8, "replicate", 64, False)],
)
def test_neighbours_are_near(ranks: int, scope: str, world_size: int, near: bool) -> None:
    seconds = LINKS.sending(gather(ranks, scope), 1, world_size)
    assert seconds == pytest.approx(0.1 if near else 1.0, rel=0.01)


def test_latency_counts_for_each_group_and_time() -> None:
    small = dataclasses.replace(gather(1024), sent_bytes=0)
    once = LINKS.sending(small, 1, 1024)
    assert once == pytest.approx(10 * constants()["links"]["latency_seconds"])
    assert LINKS.sending(dataclasses.replace(small, times=3), 5, 1024) == pytest.approx(15 * once)


def test_sending_hides_behind_work_but_for_the_first_group() -> None:
    assert LINKS.exposed(1.0, 10.0, 4) == 0.25
    assert LINKS.exposed(1.0, 0.5, 4) == 0.5
    assert LINKS.exposed(1.0, 0.0, 4) == 1.0
    assert dataclasses.replace(LINKS, overlapping=False).exposed(1.0, 10.0, 4) == 1.0


def sent(collective: list[Collective], *, forward: float, backward: float, accumulation: int = 1) -> float:
    return communication(
        LINKS,
        collective,
        groups=10,
        world_size=8,
        accumulation_steps=accumulation,
        forward_seconds=forward,
        backward_seconds=backward,
    )


def test_what_is_sent_once_hides_behind_one_micro_batch() -> None:
    once, every = gather(times=1), gather(times=16)
    assert sent([once], forward=0.1, backward=0.1, accumulation=8) > sent([once], forward=0.1, backward=0.1)
    assert sent([every], forward=0.1, backward=0.1, accumulation=8) == sent([every], forward=0.1, backward=0.1)


def test_nothing_sent_is_nothing() -> None:
    assert sent([], forward=1.0, backward=1.0) == 0


def test_stages_that_send_more_take_longer() -> None:
    alone = dataclasses.replace(LINKS, overlapping=False)
    times = [
        communication(
            alone,
            collectives(10**9, stage, 8, 1, 4, 2, 4),
            groups=10,
            world_size=8,
            accumulation_steps=4,
            forward_seconds=1.0,
            backward_seconds=2.0,
        )
        for stage in (1, 2, 3)
    ]
    assert times == sorted(times)
    assert times[0] < times[2]
