"""What this machine has, what of it bigtrain will use, what is wrong, and what to do about it."""

from __future__ import annotations

from bigtrain.config.schema import DataSection
from bigtrain.data.cache import cache_folder
from bigtrain.doctor import devices, libraries, network
from bigtrain.doctor.finding import Finding
from bigtrain.doctor.host import host_findings
from bigtrain.doctor.probe import ask_torch
from bigtrain.planner.hardware import cuda_devices

__all__ = ["Finding", "examine", "lines"]


def examine() -> list[Finding]:
    """Look at everything; takes some seconds, since torch is started and measured in a process of its own."""
    gpus, torch = cuda_devices(), devices.torch_version()
    probe = None if torch.is_fault else ask_torch(cache_folder(DataSection()))
    return [
        *host_findings(0 if gpus is None else gpus.devices),
        torch,
        *devices.device_findings(gpus, probe),
        *libraries.kernel_findings(gpus, probe),
        *libraries.library_findings(),
        network.ranks(),
        network.network(),
    ]


def lines(findings: list[Finding]) -> list[str]:
    """Return findings for people, a line each."""
    width = max(len(finding.what) for finding in findings)
    return [finding.line(width) for finding in findings]
