"""The doctor: what it finds, and what it says to do."""

from __future__ import annotations

import socket
from collections.abc import Callable

import pytest

from bigtrain import doctor
from bigtrain.doctor import Finding, examine
from bigtrain.planner.hardware import Hardware


def by_name(findings: list[Finding]) -> dict[str, Finding]:
    return {finding.what: finding for finding in findings}


def test_this_machine_passes() -> None:
    found = by_name(examine())
    for name in (
        "Python",
        "torch",
        "CPU",
        "matrix products",
        "processes",
        "ranks",
        "network",
        "datasets",
        "tokenizers",
        "optimizers",
        "attention",
        "cache",
        "runs",
    ):
        assert name in found
    assert not any(finding.is_fault for finding in found.values()), found
    assert "FLOP/s" in found["matrix products"].text


def test_what_is_absent_is_a_fault_with_a_way_out(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(doctor, "_version", lambda _name: None)
    found = by_name(examine())
    assert found["torch"] == Finding("!!", "torch", "absent; pip install torch")
    assert found["datasets"].is_fault
    assert not found["transformers"].is_fault


@pytest.mark.parametrize(
    ("version", "mark"), [("2.11.0", "ok"), ("2.13.0+cpu", "ok"), ("2.10.1", "--"), ("3.0.0", "--")]
)
def test_torch_versions(monkeypatch: pytest.MonkeyPatch, version: str, mark: str) -> None:
    monkeypatch.setattr(doctor, "_version", lambda _name: version)
    assert doctor._torch().mark == mark


def test_an_old_python_is_a_fault(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(doctor.sys, "version_info", (3, 10, 1))
    assert doctor._python().is_fault


def test_a_gpu_that_torch_does_not_see_is_a_fault(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(doctor, "cuda_devices", lambda: Hardware("cuda", "a GPU", 2, 80 * 2**30))
    monkeypatch.setattr(doctor, "_RATE_SCRIPT", "print(False, 1e12, 2e12)")
    found = by_name(list(doctor._devices()))
    assert found["CUDA"].text == "2 x a GPU, 80.00 GiB each"
    assert found["processes"].text == "cluster.devices_per_node: auto means 2; one for each GPU"
    assert found["torch and CUDA"].is_fault


def test_a_torch_that_does_not_start_is_a_fault(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(doctor, "_RATE_SCRIPT", "raise ImportError('libc10.so: no such file')")
    assert by_name(list(doctor._devices()))["torch starts"] == Finding(
        "!!", "torch starts", "ImportError: libc10.so: no such file"
    )


def test_slow_bf16_is_said(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(doctor, "_RATE_SCRIPT", "print(False, 9e10, 2e10)")
    assert by_name(list(doctor._devices()))["matrix products"].text.endswith("use amp.precision=fp32 here")


def test_ranks_of_the_environment_are_told(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(doctor.os, "environ", {})
    assert doctor._ranks() == Finding("ok", "ranks", "none in the environment; bigtrain launch starts its own")
    told = {"RANK": "5", "WORLD_SIZE": "8", "LOCAL_RANK": "1", "LOCAL_WORLD_SIZE": "4"}
    monkeypatch.setattr(doctor.os, "environ", told)
    assert doctor._ranks().mark == "--"
    assert doctor._ranks().text.startswith("rank 5 of 8, 4 on this machine, as the environment says; ")


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
    monkeypatch.setattr(doctor.os, "environ", environment)
    assert doctor._ranks().is_fault
    assert text in doctor._ranks().text


def address_of(address: str) -> Callable[[str], str]:
    def found(_name: str) -> str:
        if not address:
            raise socket.gaierror(-2, "Name or service not known")
        return address

    return found


@pytest.mark.parametrize(
    ("address", "mark", "text"),
    [
        ("10.0.0.7", "ok", "node7 is 10.0.0.7; on one node ranks meet on loopback"),
        ("127.0.1.1", "--", "node7 is 127.0.1.1, which other nodes do not reach; for several nodes "),
        ("", "--", "node7 has no address (Name or service not known); for several nodes "),
    ],
)
def test_a_name_that_other_nodes_do_not_reach_is_worth_knowing(
    address: str, mark: str, text: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(doctor.os, "environ", {})
    monkeypatch.setattr(doctor.socket, "gethostname", lambda: "node7")
    monkeypatch.setattr(doctor.socket, "gethostbyname", address_of(address))
    found = doctor._network()
    assert found.mark == mark
    assert found.text.startswith(text)


def test_an_interface_for_gloo_that_is_not_there_is_a_fault(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(doctor.socket, "if_nameindex", lambda: [(1, "lo"), (2, "eth0")])
    monkeypatch.setattr(doctor.os, "environ", {"GLOO_SOCKET_IFNAME": "eth0"})
    assert doctor._network() == Finding("ok", "network", "GLOO_SOCKET_IFNAME=eth0")
    monkeypatch.setattr(doctor.os, "environ", {"GLOO_SOCKET_IFNAME": "eth1"})
    assert doctor._network() == Finding("!!", "network", "GLOO_SOCKET_IFNAME=eth1; there is no eth1, but eth0, lo")


def test_little_room_is_worth_knowing(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(doctor.shutil, "disk_usage", lambda _folder: type("Usage", (), {"free": 2**30}))
    assert {finding.mark for finding in doctor._room()} == {"--"}


def test_which_kernels_the_optimizers_use_is_said(monkeypatch: pytest.MonkeyPatch) -> None:
    def said(*, apex: bool, gpu: Hardware | None) -> str:
        monkeypatch.setattr(doctor, "nvidia_apex_present", lambda: apex)
        monkeypatch.setattr(doctor, "cuda_devices", lambda: gpu)
        return by_name(list(doctor._kernels()))["optimizers"].text

    gpu = Hardware("cuda", "a GPU", 1, 80 * 2**30)
    assert said(apex=True, gpu=gpu).startswith("NVIDIA apex's fused kernel for LAMB in fp32 on CUDA; ")
    for apex, device in ((False, gpu), (False, None), (True, None)):
        assert said(apex=apex, gpu=device).startswith("bigtrain's own kernels for LAMB; ")
    assert said(apex=False, gpu=None).endswith("states in few bits (bf16, 8bit, 4bit) are bigtrain's own everywhere")
