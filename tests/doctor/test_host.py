"""The machine beside its devices, as other machines would be."""

from __future__ import annotations

import sys
from pathlib import Path
from types import SimpleNamespace

import pytest

from bigtrain.doctor import host
from bigtrain.doctor.finding import Finding
from bigtrain.doctor.host import host_findings

GIB = 2**30


def found(gpus: int = 0) -> dict[str, Finding]:
    return {finding.what: finding for finding in host_findings(gpus)}


@pytest.fixture
def machine(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> SimpleNamespace:
    """Return what a machine has, all of it enough; a test changes some of it."""
    has = SimpleNamespace(memory=64 * GIB, free=32 * GIB, disk=100 * GIB, shared=16 * GIB, locked=-1, files=65536)
    info = tmp_path / "meminfo"
    limits = {host.resource.RLIMIT_MEMLOCK: "locked", host.resource.RLIMIT_NOFILE: "files"}

    def available() -> int | None:
        info.write_text(f"MemTotal: 1 kB\nMemAvailable:   {has.free // 1024} kB\n")
        monkeypatch.setattr(host, "MEMORY_INFO", info)
        return read()

    def usage(folder: Path) -> SimpleNamespace:
        if folder == host.SHARED_MEMORY and not has.shared:
            raise FileNotFoundError
        return SimpleNamespace(total=has.shared, free=has.disk)

    read = host._available_bytes
    monkeypatch.setattr(host, "_available_bytes", available)
    monkeypatch.setattr(host, "cpu", lambda: SimpleNamespace(memory_bytes=has.memory))
    monkeypatch.setattr(host.shutil, "disk_usage", usage)
    monkeypatch.setattr(host.resource, "getrlimit", lambda which: (getattr(has, limits[which]), -1))
    return has


def test_a_machine_with_enough_of_everything_is_in_order(machine: SimpleNamespace) -> None:
    for gpus in (0, 8):
        assert {finding.state for finding in found(gpus).values()} == {"ok"}
    assert found()["host memory"].text == "64.00 GiB for this process, 32.00 GiB of the machine's free"
    assert found(8)["locked memory"].text == "unlimited (ulimit -l)"
    assert found(8)["shared memory"].text == "/dev/shm has 16.00 GiB"
    assert found()["open files"].text == "65,536 at a time (ulimit -n)"


@pytest.mark.parametrize(
    ("what", "changes", "gpus", "do"),
    [
        ("host memory", {"memory": GIB}, 0, "raise the limit of the container or the job"),
        ("host memory", {"free": GIB}, 0, "end what else runs here"),
        ("cache", {"disk": GIB}, 0, "make room, or set BIGTRAIN_CACHE to another folder"),
        ("runs", {"disk": GIB}, 0, "name one with --run-dir"),
        ("locked memory", {"locked": 65536}, 1, "ulimit -l unlimited"),
        ("shared memory", {"shared": 64 * 2**20}, 2, "docker run --shm-size=8g"),
        ("shared memory", {"shared": 0}, 2, "docker run --shm-size=8g"),
        ("open files", {"files": 256}, 0, "ulimit -n 65536"),
    ],
)
def test_what_is_little_is_noted_with_what_to_do(
    machine: SimpleNamespace, what: str, changes: dict[str, int], gpus: int, do: str
) -> None:
    for name, value in changes.items():
        setattr(machine, name, value)
    finding = found(gpus)[what]
    assert finding.state == "note"
    assert do in finding.do


def test_what_only_gpus_need_is_no_matter_without_one(machine: SimpleNamespace) -> None:
    machine.locked, machine.shared = 65536, 0
    assert found()["locked memory"].text == "64.00 KiB (ulimit -l); only network cards beside GPUs need it"
    assert found(1)["shared memory"].text == "no /dev/shm; only several GPUs need it"
    assert {finding.state for finding in found().values()} == {"ok"}


def test_a_folder_that_cannot_be_written_and_an_old_python_are_faults(
    machine: SimpleNamespace, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(host.os, "access", lambda _folder, _mode: False)
    monkeypatch.setattr(host, "sys", SimpleNamespace(version_info=(3, 10, 1), path=sys.path))
    faults = {what: finding.do for what, finding in found().items() if finding.is_fault}
    assert faults == {
        "Python": "use Python 3.11 to 3.13",
        "cache": "set BIGTRAIN_CACHE to another folder",
        "runs": "start in another folder, or name one with --run-dir",
    }


def test_a_system_without_meminfo_is_no_fault(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    monkeypatch.setattr(host, "MEMORY_INFO", tmp_path / "none")
    assert host._available_bytes() is None
    assert host._memory().text.endswith("for this process")
