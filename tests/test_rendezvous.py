"""Where launchers meet: who listens, who connects, and what is said where neither is possible."""

from __future__ import annotations

import socket
import sys
import threading
import time
from collections.abc import Iterator

import pytest

from bigtrain import rendezvous as module
from bigtrain.errors import InputError
from bigtrain.rendezvous import interface_of, rendezvous, run_id, split_rendezvous


@pytest.fixture
def port() -> int:
    with socket.create_server(("127.0.0.1", 0)) as free:
        return int(free.getsockname()[1])


def refused(place: str, run: str, timeout_seconds: float, text: str) -> None:
    met = rendezvous(place, run, timeout_seconds=timeout_seconds)
    with pytest.raises(InputError, match=text):
        met.__enter__()


@pytest.mark.parametrize(
    ("text", "host", "port"),
    [
        ("node1:29400", "node1", 29400),
        ("10.0.0.1:1", "10.0.0.1", 1),
        ("[::1]:65535", "::1", 65535),
        ("run-0.run:29400", "run-0.run", 29400),
    ],
)
def test_host_and_port(text: str, host: str, port: int) -> None:
    assert split_rendezvous(text) == (host, port)


@pytest.mark.parametrize(
    "text", ["node1", "node1:", ":29400", "node1:0", "node1:65536", "::1:29400", "http://a:1", "a b:1"]
)
def test_what_is_no_host_and_port(text: str) -> None:
    with pytest.raises(ValueError, match=r"is not host:port; write the name of a node and a free port"):
        split_rendezvous(text)


def test_a_run_is_known_by_its_name_and_folder() -> None:
    assert run_id("bert", "x") == run_id("bert", "x") != run_id("bert", "y")
    assert run_id("bert", "x") != run_id("gpt", "x")


def test_its_host_listens_on_that_address_alone(port: int) -> None:
    with rendezvous(f"127.0.0.1:{port}", "r", timeout_seconds=1) as place:
        assert place.listener is not None
        assert place.listener.getsockname() == ("127.0.0.1", port)
        assert (place.address, place.own_address, place.port) == ("127.0.0.1", "127.0.0.1", port)
        socket.create_connection(("127.0.0.1", port)).close()
    with pytest.raises(ConnectionRefusedError):
        socket.create_connection(("127.0.0.1", port))


def test_a_name_is_looked_up(port: int) -> None:
    with rendezvous(f"localhost:{port}", "r", timeout_seconds=1) as place:
        assert place.listener is not None
        assert place.address in ("127.0.0.1", "::1")


def test_a_port_that_something_else_uses_is_an_error(port: int) -> None:
    with socket.create_server(("127.0.0.1", port)):
        text = rf"127.0.0.1:{port}: the port is in use on this machine; name another"
        refused(f"127.0.0.1:{port}", "r", 1, text)


@pytest.mark.skipif(sys.platform != "linux", reason="names of sockets without a file are Linux's")
def test_a_second_launcher_of_the_run_connects_and_one_of_another_run_is_refused(port: int) -> None:
    with rendezvous(f"127.0.0.1:{port}", "r", timeout_seconds=1):
        with rendezvous(f"127.0.0.1:{port}", "r", timeout_seconds=1) as second:
            assert second.listener is None
            assert second.address == "127.0.0.1"
        refused(f"127.0.0.1:{port}", "other", 1, "the port is in use")
    with rendezvous(f"127.0.0.1:{port}", "other", timeout_seconds=1) as again:
        assert again.listener is not None


@pytest.fixture
def elsewhere(monkeypatch: pytest.MonkeyPatch) -> None:
    """Have loopback be another machine's."""
    monkeypatch.setattr(module, "_is_here", lambda address: False)
    monkeypatch.setattr(module, "RETRY_SECONDS", 0.05)


@pytest.mark.usefixtures("elsewhere")
def test_a_host_that_is_not_reached_is_named_after_the_timeout(port: int) -> None:
    begun = time.monotonic()
    text = rf"127.0.0.1:{port} was not reached within 0.2 s \(cluster.timeout\): Connection refused; launch the same"
    refused(f"127.0.0.1:{port}", "r", 0.2, text)
    assert time.monotonic() - begun >= 0.2


@pytest.mark.usefixtures("elsewhere")
def test_a_host_without_an_address_is_named() -> None:
    refused("nowhere.invalid:1", "r", 0.1, r"nowhere.invalid:1 was not reached within 0.1 s")


@pytest.fixture
def late_host(port: int) -> Iterator[None]:
    """Listen a moment later."""
    ended = threading.Event()

    def listen() -> None:
        time.sleep(0.2)
        with socket.create_server(("127.0.0.1", port)):
            ended.wait(60)

    thread = threading.Thread(target=listen)
    thread.start()
    yield
    ended.set()
    thread.join()


@pytest.mark.usefixtures("elsewhere", "late_host")
def test_the_others_wait_for_the_host(port: int) -> None:
    with rendezvous(f"127.0.0.1:{port}", "r", timeout_seconds=60) as place:
        assert place.listener is None
        assert (place.address, place.own_address) == ("127.0.0.1", "127.0.0.1")


def test_an_error_while_it_is_held_is_not_taken_for_one_of_connecting(port: int) -> None:
    with pytest.raises(OSError, match="mine"), rendezvous(f"127.0.0.1:{port}", "r", timeout_seconds=60):
        raise OSError("mine")


def test_a_machine_whose_name_means_loopback_to_itself_listens_where_others_reach_it(
    port: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(module, "_addresses", lambda host: ["127.0.1.1"])
    monkeypatch.setattr(module, "_address_towards", lambda place: "127.0.0.1")
    with rendezvous(f"thismachine:{port}", "r", timeout_seconds=1) as place:
        assert place.listener is not None
        assert place.listener.getsockname()[0] == place.address == "127.0.0.1"
        with rendezvous(f"thismachine:{port}", "r", timeout_seconds=1) as second:  # another launcher of the run here
            assert second.listener is None
            assert second.address == "127.0.0.1"


def test_without_a_network_a_machine_listens_to_itself(port: int, monkeypatch: pytest.MonkeyPatch) -> None:
    def unreachable(place: object) -> str:
        raise OSError(101, "Network is unreachable")

    monkeypatch.setattr(module, "_addresses", lambda host: ["127.0.1.1"])
    monkeypatch.setattr(module, "_address_towards", unreachable)
    with rendezvous(f"thismachine:{port}", "r", timeout_seconds=1) as place:
        assert place.address == "127.0.1.1"


@pytest.mark.skipif(sys.platform != "linux", reason="asks Linux")
def test_interfaces_have_names() -> None:
    assert interface_of("127.0.0.1") == "lo"
    assert interface_of("192.0.2.1") is None
    assert interface_of("::1") is None
