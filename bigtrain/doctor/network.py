"""What the environment says of ranks, and how other nodes reach this one."""

from __future__ import annotations

import os
import socket

from bigtrain.doctor.finding import Finding, fault, note, ok
from bigtrain.errors import InputError
from bigtrain.world import check_told, world_of


def ranks() -> Finding:
    """Return what the environment says of ranks: in an allocation, or a shell that a launcher has left, it may."""
    try:
        world = world_of(os.environ)
        if world is None:
            check_told(os.environ)
            return ok("ranks", "none in the environment; bigtrain launch starts its own")
    except InputError as error:
        text, _, instead = str(error).rpartition("; ")
        return fault("ranks", text or str(error), instead)
    place = f"rank {world.rank} of {world.size}, {world.local_size} on this machine, as the environment says"
    return note("ranks", place, "bigtrain launch is that one and starts no others; unset RANK and WORLD_SIZE if not so")


def network() -> Finding:
    """Return where this machine's name leads: gloo tells that to other nodes unless it is given an interface."""
    chosen, name = os.environ.get("GLOO_SOCKET_IFNAME"), socket.gethostname()
    if chosen is not None:
        return _interface(chosen)
    try:
        address = socket.gethostbyname(name)
        if not address.startswith("127."):
            return ok("network", f"{name} is {address}; on one node ranks meet on loopback")
        found = f"{name} is {address}, which other nodes do not reach"
    except OSError as error:
        found = f"{name} has no address ({error.strerror})"
    use = "for several nodes under torchrun or srun set GLOO_SOCKET_IFNAME; cluster.rendezvous needs none"
    return note("network", found, use)


def _interface(chosen: str) -> Finding:
    there = {interface for _, interface in socket.if_nameindex()}
    absent = [each for each in chosen.split(",") if each not in there]
    text = f"GLOO_SOCKET_IFNAME={chosen}"
    if not absent:
        return ok("network", text)
    return fault("network", f"{text}; there is no {absent[0]}", f"set it to one of {', '.join(sorted(there))}")
