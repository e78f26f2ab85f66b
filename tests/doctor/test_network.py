"""Ranks of the environment, and where this machine's name leads."""

from __future__ import annotations

import socket
from collections.abc import Callable

import pytest

from bigtrain.doctor import network
from bigtrain.doctor.finding import fault, ok


def test_ranks_of_the_environment_are_told(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(network.os, "environ", {})
    assert network.ranks() == ok("ranks", "none in the environment; bigtrain launch starts its own")
    told = {"RANK": "5", "WORLD_SIZE": "8", "LOCAL_RANK": "1", "LOCAL_WORLD_SIZE": "4"}
    monkeypatch.setattr(network.os, "environ", told)
    assert network.ranks().state == "note"
    assert network.ranks().text == "rank 5 of 8, 4 on this machine, as the environment says"
    assert network.ranks().do.startswith("bigtrain launch is that one and starts no others; ")


@pytest.mark.parametrize(
    ("environment", "text"),
    [
        ({"RANK": "8", "WORLD_SIZE": "8"}, "no such rank; let a launcher set them, or unset them"),
        ({"OMPI_COMM_WORLD_SIZE": "4"}, "mpirun has started several processes and told none its rank"),
    ],
)
def test_ranks_that_cannot_be_are_a_fault(
    environment: dict[str, str], text: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(network.os, "environ", environment)
    assert network.ranks().is_fault
    assert network.ranks().do
    assert text in network.ranks().line(0)


def address_of(address: str) -> Callable[[str], str]:
    def found(_name: str) -> str:
        if not address:
            raise socket.gaierror(-2, "Name or service not known")
        return address

    return found


@pytest.mark.parametrize(
    ("address", "state", "text"),
    [
        ("10.0.0.7", "ok", "node7 is 10.0.0.7; on one node ranks meet on loopback"),
        ("127.0.1.1", "note", "node7 is 127.0.1.1, which other nodes do not reach"),
        ("", "note", "node7 has no address (Name or service not known)"),
    ],
)
def test_a_name_that_other_nodes_do_not_reach_is_worth_knowing(
    address: str, state: str, text: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(network.os, "environ", {})
    monkeypatch.setattr(network.socket, "gethostname", lambda: "node7")
    monkeypatch.setattr(network.socket, "gethostbyname", address_of(address))
    found = network.network()
    assert (found.state, found.text) == (state, text)
    assert (found.do == "") == (state == "ok")


def test_an_interface_for_gloo_that_is_not_there_is_a_fault(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(network.socket, "if_nameindex", lambda: [(1, "lo"), (2, "eth0")])
    monkeypatch.setattr(network.os, "environ", {"GLOO_SOCKET_IFNAME": "eth0"})
    assert network.network() == ok("network", "GLOO_SOCKET_IFNAME=eth0")
    monkeypatch.setattr(network.os, "environ", {"GLOO_SOCKET_IFNAME": "eth1"})
    expected = fault("network", "GLOO_SOCKET_IFNAME=eth1; there is no eth1", "set it to one of eth0, lo")
    assert network.network() == expected
