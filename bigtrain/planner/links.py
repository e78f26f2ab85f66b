"""Seconds that ranks spend sending: collectives between them, and copies between a GPU and its host."""

from __future__ import annotations

import math
from collections.abc import Iterable
from dataclasses import dataclass

from bigtrain.config.schema import Recipe
from bigtrain.planner.hardware import Hardware
from bigtrain.planner.rates import constants
from bigtrain.sharding.cost import Collective

PCIE_DEVICES = 8
"""GPUs that are taken to share a machine where nothing links them but PCIe and the recipe does not say."""


@dataclass(frozen=True, slots=True)
class Links:
    """The rates at which one rank sends, in bytes a second, and how many ranks share a machine."""

    near_bytes_per_second: float
    far_bytes_per_second: float
    host_bytes_per_second: float
    neighbours: int
    overlapping: bool

    def sending(self, collective: Collective, groups: int, world_size: int) -> float:
        """Return the seconds of a step's collectives of one kind, if nothing hid them.

        Ranks that share a model are neighbours, ranks that hold the same part of several models are as far apart as the
        machine allows. Each group of parameters pays the latency of a tree of its ranks.
        """
        near = world_size <= self.neighbours or (collective.scope == "shard" and collective.ranks <= self.neighbours)
        rate = self.near_bytes_per_second if near else self.far_bytes_per_second
        depth = math.ceil(math.log2(collective.ranks))
        latency = collective.times * groups * depth * float(constants()["links"]["latency_seconds"])
        return collective.sent_bytes / rate + latency

    def exposed(self, seconds: float, window_seconds: float, groups: int) -> float:
        """Return what of the sending is not hidden behind work of so many seconds: the first group's at least.

        Nothing is hidden on a CPU, whose cores both send and compute.
        """
        return max(seconds / groups, seconds - window_seconds) if self.overlapping else seconds


def links_of(hardware: Hardware, recipe: Recipe) -> Links:
    """Return the links of a device in the machines that the recipe names."""
    known, row, cluster = constants()["links"], hardware.device, recipe.cluster
    share = known["share"]
    networks = known["network_bytes_per_second"]
    far = networks.get(row.architecture if row else "other", networks["other"]) * share
    host = (row.host_bytes_per_second if row else None) or known["local_bytes_per_second"]
    if hardware.kind == "cpu":
        neighbours = 1 if cluster.nodes != 1 else 2**31
        return Links(known["local_bytes_per_second"], far, host, neighbours, overlapping=False)
    linked = row is not None and row.peer_bytes_per_second is not None
    per_node = cluster.devices_per_node
    written = per_node if isinstance(per_node, int) and cluster.nodes != 1 else 0
    if linked:
        assert row is not None and row.peer_bytes_per_second is not None
        return Links(row.peer_bytes_per_second * share, far, host, written or row.peer_devices, overlapping=True)
    return Links(host, far, host, written or PCIE_DEVICES, overlapping=True)


def communication(
    links: Links,
    collectives: Iterable[Collective],
    *,
    groups: int,
    world_size: int,
    accumulation_steps: int,
    forward_seconds: float,
    backward_seconds: float,
) -> float:
    """Return the exposed seconds of a step's collectives.

    What is sent once a step hides behind one micro-batch's pass, what is sent in each one behind all of them.
    """
    exposed = 0.0
    for collective in collectives:
        seconds = links.sending(collective, groups, world_size)
        part = 1.0 if collective.times >= accumulation_steps else 1 / accumulation_steps
        for share, window in (
            (collective.forward_share, forward_seconds),
            (1 - collective.forward_share, backward_seconds),
        ):
            if share:
                exposed += links.exposed(share * seconds, window * part, groups)
    return exposed
