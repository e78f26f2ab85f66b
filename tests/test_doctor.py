"""The doctor: what it finds, and what it says to do."""

from __future__ import annotations

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
    assert found["torch and CUDA"].is_fault


def test_a_torch_that_does_not_start_is_a_fault(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(doctor, "_RATE_SCRIPT", "raise ImportError('libc10.so: no such file')")
    assert by_name(list(doctor._devices()))["torch starts"] == Finding(
        "!!", "torch starts", "ImportError: libc10.so: no such file"
    )


def test_slow_bf16_is_said(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(doctor, "_RATE_SCRIPT", "print(False, 9e10, 2e10)")
    assert by_name(list(doctor._devices()))["matrix products"].text.endswith("use amp.precision=fp32 here")


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
