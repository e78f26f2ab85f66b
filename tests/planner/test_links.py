"""Seconds of sending: what is near is fast, what hides behind work is free, and a CPU hides nothing."""

from __future__ import annotations

import dataclasses
from typing import Any

import pytest

from bigtrain.config.schema import Recipe
from bigtrain.planner.devices import devices
from bigtrain.planner.hardware import of_name
from bigtrain.planner.links import Links, Way, communication, exposed_seconds, links_of, transfers
from bigtrain.planner.rates import constants
from bigtrain.sharding.cost import Collective, collectives, tensor_sums

RING = Way(tree=False, start_seconds=1e-5, near_step_seconds=1e-6, far_step_seconds=1e-5, share=1.0)
TREE = Way(tree=True, start_seconds=1e-5, near_step_seconds=1e-6, far_step_seconds=1e-5, share=0.9)
LINKS = Links(1e11, 1e10, 2e10, 8, True, "NVLink", (RING, TREE))


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


def gather(ranks: int = 8, scope: Any = "shard", times: int = 1, groups: int = 10) -> Collective:
    return Collective("all_gather", 10**10, ranks, scope, times, times * groups, 0.5)


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


def test_a_bridge_between_two_does_not_link_a_machine() -> None:
    pair, machine = (links_of(of_name("h100-pcie"), recipe(nodes=2, devices_per_node=devices)) for devices in (2, 8))
    assert pair.near_name == "NVLink" and machine.near_name == "PCIe"
    assert machine.near_bytes_per_second == machine.host_bytes_per_second < pair.near_bytes_per_second


def test_each_gpu_of_a_data_centre_has_an_adapter_others_share_one() -> None:
    h100 = [links_of(of_name("h100"), recipe(nodes=2, devices_per_node=n)).far_bytes_per_second for n in (4, 8)]
    l40s = [links_of(of_name("l40s"), recipe(nodes=2, devices_per_node=n)).far_bytes_per_second for n in (4, 8)]
    assert h100[0] == h100[1] == pytest.approx(0.8 * 5e10)
    assert l40s[0] == 2 * l40s[1] == pytest.approx(0.8 * 1.25e9 / 4)


def test_amd_has_another_name_for_it() -> None:
    assert links_of(of_name("mi300x"), recipe()).near_name == "Infinity Fabric"
    assert links_of(of_name("cpu-laptop"), recipe()).near_name == "host memory"


@pytest.mark.parametrize(
    ("ranks", "scope", "world_size", "rate", "link"),
    [
        (8, "shard", 8, 1e11, "NVLink"),
        (8, "shard", 64, 1e11, "NVLink"),
        (64, "shard", 64, 8e10, "network"),  # a ring leaves a machine by the adapters of all its eight ranks
        (16, "shard", 64, 8e10, "network"),
        (8, "replicate", 64, 1e10, "network"),  # one of its ranks in each machine: one adapter
        (16, "replicate", 64, 2e10, "network"),  # groups of four share a model, so two in each machine
        (64, "replicate", 64, 8e10, "network"),
        (4, "replicate", 8, 1e11, "NVLink"),
    ],
)
def test_the_link_that_bounds_a_collective(ranks: int, scope: Any, world_size: int, rate: float, link: str) -> None:
    found = LINKS.transfer(gather(ranks, scope), world_size)
    assert found.link == link
    assert found.seconds == pytest.approx(1e10 / rate, rel=0.02)


def test_a_network_faster_than_the_machine_is_bounded_by_the_machine() -> None:
    fast = dataclasses.replace(LINKS, far_bytes_per_second=9e10)
    assert fast.transfer(gather(64), 64).seconds == pytest.approx(0.1, rel=0.02)


def test_steps_of_a_ring_grow_with_its_ranks() -> None:
    """A ring of n ranks on n / 8 machines: of n - 1 steps, n / 8 - 1 are between machines."""
    small = dataclasses.replace(gather(), sent_bytes=0)
    for ranks in (16, 1024, 16384):
        found = LINKS.transfer(dataclasses.replace(small, ranks=ranks), ranks).each_seconds
        far = ranks // 8 - 1
        assert found == pytest.approx(1e-5 + far * 1e-5 + (ranks - 1 - far) * 1e-6)


def test_sums_go_by_trees_where_there_are_many_machines() -> None:
    tiny = Collective("all_reduce", 8, 16384, "replicate", 1, 1)
    found = LINKS.transfer(tiny, 16384).each_seconds
    assert found == pytest.approx(1e-5 + 14e-6 + 2 * 11 * 1e-5, rel=1e-3)  # seven steps in a machine, 2**11 machines
    large = dataclasses.replace(tiny, sent_bytes=10**13)
    assert LINKS.transfer(large, 16384).seconds == pytest.approx(10**13 / 8e10, rel=0.01)  # the ring wastes nothing


def test_latency_counts_for_each_group_and_time() -> None:
    small = dataclasses.replace(gather(1024), sent_bytes=0)
    once = LINKS.transfer(small, 1024)
    assert once.seconds == pytest.approx(10 * once.each_seconds)
    assert LINKS.transfer(dataclasses.replace(small, calls=30), 1024).seconds == pytest.approx(3 * once.seconds)


@pytest.mark.parametrize(("nodes", "microseconds"), [(1, 32), (16, 300), (256, 4400)])
def test_seconds_of_nccl(nodes: int, microseconds: float) -> None:
    """What an empty all-gather takes on machines of eight H100 by the constants in NCCL's src/graph/tuning.cc.

    One machine: Simple, 8.4 + 7 x 3.4; more: LL128, 14 + (n - nodes) x 1.9 + (nodes - 1) x 4.
    """
    links = links_of(of_name("h100"), recipe(nodes=nodes, devices_per_node=8))
    empty = dataclasses.replace(gather(8 * nodes), sent_bytes=0)
    found = links.transfer(empty, 8 * nodes).each_seconds * 1e6
    lowest = 14 + 7 * nodes * 1.9 + (nodes - 1) * 4.0
    assert found == pytest.approx(min(lowest, 8.4 + 7 * nodes * 3.4 + (nodes - 1) * 14))
    assert found == pytest.approx(microseconds, rel=0.15)


def test_a_transfer_as_an_object() -> None:
    found = LINKS.transfer(gather(64, times=2, groups=33), 64).as_object()
    assert {key: found[key] for key in ("kind", "link", "ranks", "collectives", "sent_bytes")} == {
        "kind": "all_gather",
        "link": "network",
        "ranks": 64,
        "collectives": 66,
        "sent_bytes": 10**10,
    }


def test_sending_hides_behind_work_but_for_the_first_group() -> None:
    assert LINKS.exposed(1.0, 10.0, 4) == 0.25
    assert LINKS.exposed(1.0, 0.5, 4) == 0.5
    assert LINKS.exposed(1.0, 0.0, 4) == 1.0
    assert dataclasses.replace(LINKS, overlapping=False).exposed(1.0, 10.0, 4) == 1.0


def sent(
    collective: list[Collective], *, forward: float, backward: float, accumulation: int = 1, world_size: int = 8
) -> float:
    return communication(
        LINKS,
        collective,
        world_size=world_size,
        accumulation_steps=accumulation,
        forward_seconds=forward,
        backward_seconds=backward,
    )


def test_what_is_sent_once_hides_behind_one_micro_batch() -> None:
    once, every = gather(times=1), gather(times=16)
    assert sent([once], forward=0.1, backward=0.1, accumulation=8) > sent([once], forward=0.1, backward=0.1)
    assert sent([every], forward=0.1, backward=0.1, accumulation=8) == pytest.approx(0.01, rel=0.05)


def test_sending_in_every_pass_waits_behind_what_is_sent_once() -> None:
    """Four micro-batches of a tenth of a second: three hide their own gathers, the last also sums over replicas."""
    gathers, sums = gather(times=8), Collective("all_reduce", 10**9, 8, "replicate", 1, 10)
    found = transfers(LINKS, [gathers, sums], 64)
    alone = [one.each_seconds for one in found]
    exposed = exposed_seconds(LINKS, found, accumulation_steps=4, forward_seconds=0.4, backward_seconds=0.4)
    expected = 8 * alone[0] + alone[1]  # a gather in each of the eight passes; the sum in the last
    assert exposed == pytest.approx(expected)


def test_links_are_busy_at_the_same_time() -> None:
    """A reduce-scatter in the machine and a sum over the network hide behind the same work; two on one link do not."""
    near, far = (
        Collective("reduce_scatter", 10**10, 8, "shard", 1, 10),
        Collective("all_reduce", 10**9, 8, "replicate", 1, 10),
    )
    assert sent([near, far], forward=0.1, backward=0.1, world_size=64) == pytest.approx(0.02, rel=0.05)
    assert sent([near, near], forward=0.1, backward=0.1, world_size=64) == pytest.approx(0.1, rel=0.05)


def test_nothing_sent_is_nothing() -> None:
    assert sent([], forward=1.0, backward=1.0) == 0


def test_stages_that_send_more_take_longer() -> None:
    alone = dataclasses.replace(LINKS, overlapping=False)
    times = [
        communication(
            alone,
            collectives(10**9, stage, 8, 1, 4, 2, 4, groups=10),
            world_size=8,
            accumulation_steps=4,
            forward_seconds=1.0,
            backward_seconds=2.0,
        )
        for stage in (1, 2, 3)
    ]
    assert times == sorted(times)
    assert times[0] < times[2]


def test_nothing_hides_a_sum_that_ranks_wait_for() -> None:
    waiting = transfers(LINKS, tensor_sums(4, 10**8, blocks=10, repeated=5, accumulation_steps=2), 8)
    hidden = transfers(LINKS, [gather()], 8)
    options = {"accumulation_steps": 2, "forward_seconds": 100.0, "backward_seconds": 200.0}
    alone = exposed_seconds(LINKS, hidden, **options)  # type: ignore[arg-type]
    both = exposed_seconds(LINKS, [*waiting, *hidden], **options)  # type: ignore[arg-type]
    assert both - alone == pytest.approx(sum(one.seconds for one in waiting))


def test_those_that_share_products_are_nearest() -> None:
    sums, (gathered, *_) = tensor_sums(8, 10**8, 10, 0, 1), collectives(10**9, 3, 4, 1, 1, 2, 4, apart=8)
    near, far = (transfers(LINKS, [one], 32)[0].link for one in (sums[0], gathered))
    assert (near, far) == ("NVLink", "network")
