"""Seconds that ranks spend sending: collectives between them, and copies between a GPU and its host."""

from __future__ import annotations

import math
from collections.abc import Iterable, Sequence
from dataclasses import dataclass

from bigtrain.config.schema import Recipe
from bigtrain.planner.hardware import Hardware
from bigtrain.planner.rates import constants
from bigtrain.sharding.cost import Collective

PCIE_DEVICES = 8
"""GPUs that are taken to share a machine where nothing links them but PCIe and the recipe does not say."""

NETWORK = "network"


@dataclass(frozen=True, slots=True)
class Way:
    """One way to run a collective: what it takes besides moving bytes, and the share of a link's rate that it reaches.

    `start_seconds` are paid once, the others for each step from one rank to the next in a machine and between machines.
    A ring of n ranks takes n - 1 steps, twice that for a sum; a tree, for sums alone, the depth of it up and down.
    """

    tree: bool
    start_seconds: float
    near_step_seconds: float
    far_step_seconds: float
    share: float

    def seconds(self, collective: Collective, members: int, rate: float, sent_bytes: float) -> float:
        """Return what one collective takes, with so many of its ranks in each machine, at a rate in bytes a second."""
        machines = -(-collective.ranks // members)
        if self.tree:
            near, far = 2 * (members - 1), 2 * math.floor(math.log2(machines))
        else:
            passes = 2 if collective.kind == "all_reduce" else 1
            far = passes * (machines - 1)
            near = passes * (collective.ranks - 1) - far
        latency = self.start_seconds + near * self.near_step_seconds + far * self.far_step_seconds
        return latency + sent_bytes / (rate * self.share)


@dataclass(frozen=True, slots=True)
class Transfer:
    """The collectives of one kind in a step: over which link, and the seconds of each."""

    collective: Collective
    link: str
    each_seconds: float

    @property
    def seconds(self) -> float:
        """Return what all of them take in a step, hidden or not."""
        return self.collective.calls * self.each_seconds

    def as_object(self) -> dict[str, object]:
        """Return what `bigtrain plan --json` prints."""
        sent = self.collective
        return {
            "kind": sent.kind,
            "link": self.link,
            "ranks": sent.ranks,
            "collectives": sent.calls,
            "sent_bytes": sent.sent_bytes,
            "seconds": self.seconds,
        }


@dataclass(frozen=True, slots=True)
class Links:
    """The rates at which one rank sends, in bytes a second, and how many ranks share a machine.

    `far_bytes_per_second` is a rank's share of its machine's network. `near_name` is what links a machine's ranks.
    """

    near_bytes_per_second: float
    far_bytes_per_second: float
    host_bytes_per_second: float
    neighbours: int
    overlapping: bool
    near_name: str
    ways: tuple[Way, ...]

    def transfer(self, collective: Collective, world_size: int) -> Transfer:
        """Return a step's collectives of one kind on the link that bounds them.

        Ranks that share a model are neighbours, ranks that hold the same part of several models are as far apart as the
        layout allows. A ring that passes through a machine's m ranks leaves it by all of their adapters, one for each
        of its channels, so that it has m times the rate of one.
        """
        members = self._members(collective, world_size)
        near, rate = collective.ranks <= members, self.near_bytes_per_second
        if not near:
            rate = min(rate, members * self.far_bytes_per_second)
        sent = collective.sent_bytes / collective.calls
        ways = [way for way in self.ways if collective.kind == "all_reduce" or not way.tree]
        each = min(way.seconds(collective, members, rate, sent) for way in ways)
        return Transfer(collective, self.near_name if near else NETWORK, each)

    def _members(self, collective: Collective, world_size: int) -> int:
        """Return how many of a collective's ranks a machine has."""
        if world_size <= self.neighbours:
            return collective.ranks
        apart = world_size // collective.ranks if collective.scope == "replicate" else collective.apart
        return max(1, min(collective.ranks, self.neighbours // apart))

    def exposed(self, seconds: float, window_seconds: float, groups: int) -> float:
        """Return what of the sending is not hidden behind work of so many seconds: the first group's at least.

        Nothing is hidden on a CPU, whose cores both send and compute.
        """
        return max(seconds / groups, seconds - window_seconds) if self.overlapping else seconds


def links_of(hardware: Hardware, recipe: Recipe) -> Links:
    """Return the links of a device in the machines that the recipe names."""
    known, row, cluster = constants()["links"], hardware.device, recipe.cluster
    host = (row.host_bytes_per_second if row else None) or known["local_bytes_per_second"]
    per_node = cluster.devices_per_node
    written = per_node if isinstance(per_node, int) and cluster.nodes != 1 else 0
    if hardware.kind == "cpu":
        neighbours = 1 if cluster.nodes != 1 else 2**31
        far, ways = _network(None, written or 1), _ways("host memory")
        return Links(known["local_bytes_per_second"], far, host, neighbours, False, "host memory", ways)
    peers = row.peer_devices if row is not None else 1
    neighbours = written or (peers if peers > 1 else PCIE_DEVICES)
    far = _network(row.architecture if row else None, neighbours)
    if row is not None and row.peer_bytes_per_second is not None and neighbours <= peers:
        near, name = row.peer_bytes_per_second * known["share"], "NVLink"
        name = known["peer_names"].get(row.architecture, name)
        return Links(near, far, host, neighbours, True, name, _ways("NVLink"))
    return Links(host, far, host, neighbours, True, "PCIe", _ways("PCIe"))


def _network(architecture: str | None, devices: int) -> float:
    """Return a rank's share of the network: an adapter of its own, or one that the machine's devices share."""
    known = constants()["links"]
    of_each = known["network_bytes_per_second"].get(architecture)
    return float(known["share"] * (of_each or known["shared_network_bytes_per_second"] / devices))


def _ways(link: str) -> tuple[Way, ...]:
    return tuple(Way(**way) for way in constants()["links"]["ways"][link])


def transfers(links: Links, collectives: Iterable[Collective], world_size: int) -> list[Transfer]:
    """Return a step's collectives with the link that each is bound by and what it takes."""
    return [links.transfer(collective, world_size) for collective in collectives]


def exposed_seconds(
    links: Links,
    sent: Sequence[Transfer],
    *,
    accumulation_steps: int,
    forward_seconds: float,
    backward_seconds: float,
) -> float:
    """Return what of a step's collectives no work hides.

    Collectives on one link wait for each other, those on different links do not. What is sent once a step hides behind
    one micro-batch's pass, what is sent in each one behind all of them. The first group that is gathered and the last
    that is reduced have nothing to hide behind. Ranks that share products wait for each sum.
    """
    exposed = sum(one.seconds for one in sent if one.collective.scope == "tensor")
    sent = [one for one in sent if one.collective.scope != "tensor"]
    for forward, window in ((True, forward_seconds), (False, backward_seconds)):
        shares = [(one, _share(one.collective, forward=forward) * one.seconds) for one in sent]
        each = [(one, part / accumulation_steps) for one, part in shares if _repeated(one, accumulation_steps)]
        once = [(one, part) for one, part in shares if not _repeated(one, accumulation_steps)]
        pass_seconds = window / accumulation_steps
        exposed += (accumulation_steps - 1) * _exposed(links, each, pass_seconds)
        exposed += _exposed(links, [*each, *once], pass_seconds)
    return exposed


def communication(
    links: Links,
    collectives: Iterable[Collective],
    *,
    world_size: int,
    accumulation_steps: int,
    forward_seconds: float,
    backward_seconds: float,
) -> float:
    """Return the exposed seconds of a step's collectives."""
    return exposed_seconds(
        links,
        transfers(links, collectives, world_size),
        accumulation_steps=accumulation_steps,
        forward_seconds=forward_seconds,
        backward_seconds=backward_seconds,
    )


def _share(collective: Collective, *, forward: bool) -> float:
    return collective.forward_share if forward else 1 - collective.forward_share


def _repeated(one: Transfer, accumulation_steps: int) -> bool:
    return one.collective.times >= accumulation_steps


def _exposed(links: Links, parts: Sequence[tuple[Transfer, float]], window_seconds: float) -> float:
    """Return what one pass of one micro-batch does not hide."""
    busy: dict[str, float] = {}
    for one, seconds in parts:
        busy[one.link] = busy.get(one.link, 0.0) + seconds
    if not links.overlapping:
        return sum(busy.values())
    alone = sum(one.each_seconds for one, seconds in parts if seconds)
    return max(alone, max(busy.values(), default=0.0) - window_seconds)
