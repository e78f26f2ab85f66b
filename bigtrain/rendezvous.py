"""Where the launchers of several nodes meet: who listens there, and how this node is reached. No torch here."""

from __future__ import annotations

import errno
import hashlib
import ipaddress
import re
import socket
import struct
import sys
import time
from collections.abc import Iterator
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass

from bigtrain.errors import InputError

RETRY_SECONDS = 0.5

CONNECT_SECONDS = 5.0
"""How long one try to connect may take."""

FAR_AWAY = ("192.0.2.1", 9)
"""An address of documentation (RFC 5737): which interface would lead there tells the node's own address."""


@dataclass(frozen=True)
class Rendezvous:
    """A place where nodes meet, as one of them sees it.

    `address` is the listening node's, `own_address` this one's, by which the others reach it. `listener` is an open
    socket where this node is the one that listens. `interface` is the name of the interface of `own_address`, None
    where that cannot be told.
    """

    address: str
    port: int
    own_address: str
    listener: socket.socket | None = None
    interface: str | None = None


def split_rendezvous(text: str) -> tuple[str, int]:
    """Return host and port of `host:port`, or of `[IPv6 address]:port`. Raises ValueError for anything else."""
    found = re.fullmatch(r"(?:\[([0-9A-Fa-f:.]+)\]|([^\s:\[\]/]+)):(\d{1,5})", text)
    if found is None or not 0 < int(found[3]) < 2**16:
        raise ValueError(f"{text!r} is not host:port; write the name of a node and a free port, such as node1:29400")
    return found[1] or found[2], int(found[3])


def run_id(name: str, folder: str) -> str:
    """Return what tells a run from others that meet in the same place: the same on every node."""
    return hashlib.blake2b(f"{name}/{folder}".encode(), digest_size=8).hexdigest()


@contextmanager
def rendezvous(text: str, run: str, *, timeout_seconds: float) -> Iterator[Rendezvous]:
    """Listen at a place if this is its host, else connect to it once; the port is held as long as this lasts.

    Connecting is tried again until the timeout: the launcher there may start later. On the host a second launcher of
    the same run connects to the first, so that several can run on one machine. Raises InputError for a port that
    something else uses, and for a host that is not reached, naming it.
    """
    host, port = split_rendezvous(text)
    end = time.monotonic() + timeout_seconds
    with ExitStack() as held:
        found = None
        while found is None:
            try:
                found = _reached(host, port, run, held)
            except OSError as error:
                if time.monotonic() > end:
                    reason = error.strerror or str(error)
                    what = f"{text} was not reached within {timeout_seconds:g} s (cluster.timeout): {reason}"
                    raise InputError(f"{what}; launch the same there, open the port, or name another host") from None
                time.sleep(RETRY_SECONDS)
        yield found


def _reached(host: str, port: int, run: str, held: ExitStack) -> Rendezvous:
    """Return the place, listening or connected to. Raises OSError where that may work later."""
    there = host
    for address in _addresses(host):
        if _is_here(address):
            there = _outer(address, host)
            listener = _listening(there, port, run, host)
            if listener is not None:
                held.enter_context(listener)
                held.enter_context(_marked(run, port))
                return Rendezvous(there, port, there, listener, interface_of(there))
    with socket.create_connection((there, port), timeout=CONNECT_SECONDS) as connection:
        own, address = connection.getsockname()[0], connection.getpeername()[0]
    return Rendezvous(address, port, own, None, interface_of(own))


def _addresses(host: str) -> list[str]:
    found = socket.getaddrinfo(host, None, type=socket.SOCK_STREAM)
    return list(dict.fromkeys(str(entry[4][0]) for entry in found))


def _is_here(address: str) -> bool:
    """Tell whether an address is one of this machine's: only to those can a socket be bound."""
    try:
        with socket.socket(_family(address), socket.SOCK_STREAM) as probe:
            probe.bind((address, 0))
    except OSError as error:
        if error.errno == errno.EADDRNOTAVAIL:
            return False
        raise
    return True


def _outer(address: str, host: str) -> str:
    """Return the address on which others reach this machine, where its name has one on which they do not.

    Debian gives a machine's own name an address of loopback. Without a network there is no other.
    """
    if host in (address, "localhost") or not ipaddress.ip_address(address).is_loopback:
        return address
    try:
        return _address_towards(FAR_AWAY)
    except OSError:
        return address


def _listening(address: str, port: int, run: str, host: str) -> socket.socket | None:
    """Return a socket that listens; None where another launcher of this run on this machine does so already."""
    listener = socket.socket(_family(address), socket.SOCK_STREAM)
    listener.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
    try:
        listener.bind((address, port))
        listener.listen(socket.SOMAXCONN)
    except OSError as error:
        listener.close()
        if error.errno != errno.EADDRINUSE:
            raise
        if _is_marked(run, port):
            return None
        raise InputError(
            f"{host}:{port}: the port is in use on this machine; name another one in cluster.rendezvous, on every node"
        ) from None
    return listener


@contextmanager
def _marked(run: str, port: int) -> Iterator[None]:
    """Tell other launchers on this machine which run listens at a port, by a name that ends with this process."""
    if sys.platform != "linux":
        yield
        return
    with socket.socket(socket.AF_UNIX, socket.SOCK_DGRAM) as mark:
        mark.bind(_mark(run, port))
        yield


def _is_marked(run: str, port: int) -> bool:
    if sys.platform != "linux":
        return False
    with socket.socket(socket.AF_UNIX, socket.SOCK_DGRAM) as probe:
        return probe.connect_ex(_mark(run, port)) == 0


def _mark(run: str, port: int) -> str:
    return f"\0bigtrain/{run}/{port}"


def _address_towards(place: tuple[str, int]) -> str:
    """Return the address from which this machine would send there; nothing is sent."""
    with socket.socket(socket.AF_INET, socket.SOCK_DGRAM) as probe:
        probe.connect(place)
        return str(probe.getsockname()[0])


def interface_of(address: str) -> str | None:
    """Return the name of the interface that has an IPv4 address; None where that cannot be told (Linux can)."""
    if sys.platform != "linux" or _family(address) != socket.AF_INET:
        return None
    import fcntl

    get_address = 0x8915  # SIOCGIFADDR, netdevice(7)
    if ipaddress.ip_address(address).is_loopback:
        return "lo"
    with socket.socket(socket.AF_INET, socket.SOCK_DGRAM) as probe:
        for _, name in socket.if_nameindex():
            request = struct.pack("256s", name.encode()[:15])
            try:
                answer = fcntl.ioctl(probe.fileno(), get_address, request)
            except OSError:  # an interface without an address
                continue
            if socket.inet_ntoa(answer[20:24]) == address:
                return name
    return None


def _family(address: str) -> socket.AddressFamily:
    return socket.AF_INET6 if ":" in address else socket.AF_INET
