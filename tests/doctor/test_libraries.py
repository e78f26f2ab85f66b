"""Which libraries are there, and which kernels a run uses, on machines with and without them."""

from __future__ import annotations

import pytest

from bigtrain.doctor import libraries
from bigtrain.doctor.finding import Finding
from bigtrain.doctor.libraries import kernel_findings, library_findings
from bigtrain.doctor.probe import Probe
from bigtrain.planner.hardware import Hardware

A100 = Hardware("cuda", "an A100", 1, 80 * 2**30, capability=(8, 0))
V100 = Hardware("cuda", "a V100", 1, 32 * 2**30, capability=(7, 0))
H100 = Hardware("cuda", "an H100", 1, 80 * 2**30, capability=(9, 0))


@pytest.fixture
def installed(monkeypatch: pytest.MonkeyPatch) -> set[str]:
    """Return the modules that are there; `amp_C` is what NVIDIA's apex is known by."""
    there: set[str] = set()
    monkeypatch.setattr(libraries, "find_spec", lambda name: name if name in there else None)
    monkeypatch.setattr(libraries, "nvidia_apex_present", lambda: {"amp_C", "apex"} <= there)
    return there


def kernels(gpus: Hardware | None, *, varlen: bool = True) -> dict[str, Finding]:
    probe = Probe("13.0", "2.28.9", gpus is not None, varlen, {}, "", 0.0)
    return {finding.what: finding for finding in kernel_findings(gpus, probe)}


def test_without_any_of_them_bigtrains_own_are_used(installed: set[str]) -> None:
    for gpus in (None, A100):
        found = kernels(gpus)
        assert {finding.state for finding in found.values()} == {"ok"}
        assert [name for name, finding in found.items() if finding.text.startswith("absent")] == [
            *("apex", "flash-attn", "FlashOptim", "torchao")
        ]
    assert kernels(None)["attention"].text == "torch's flash kernel for CPUs, used a document at a time"
    assert "used in bf16 and fp16" in kernels(A100)["attention"].text


def test_which_of_those_present_are_used_is_said(installed: set[str]) -> None:
    installed |= {"amp_C", "apex", "flash_attn", "flashoptim", "torchao"}
    texts = {name: finding.text for name, finding in kernels(H100).items()}
    assert texts["apex"].startswith("present, used: ")
    assert texts["flash-attn"].startswith("present: a run on a GPU that compiles no blocks")
    assert texts["FlashOptim"].startswith("present, not used: states in few bits")
    assert texts["torchao"] == "present, used by amp.precision: fp8 alone"
    assert kernels(None)["apex"].text.startswith("present, not used without a GPU")
    assert kernels(A100)["torchao"].text.startswith("present, not used: only amp.precision: fp8 is, on GPUs of 8.9")


def test_what_could_be_faster_says_how(installed: set[str]) -> None:
    assert "pip install torchao" in kernels(H100)["torchao"].do
    installed.add("apex")
    assert kernels(A100)["apex"].text.startswith("an `apex` without NVIDIA's CUDA kernels, not used")
    assert kernels(A100)["apex"].do.startswith("pip uninstall apex")
    old = kernels(V100, varlen=False)["attention"]
    assert old.text.endswith("compute capability 7.0")
    assert "8.0" in old.do
    assert "CUDA build" in kernels(A100, varlen=False)["attention"].do


def test_what_is_needed_is_a_fault_where_absent_and_what_is_not_is_none(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(libraries, "version_of", lambda _name: None)
    found = {finding.what: finding for finding in library_findings()}
    assert [name for name, finding in found.items() if finding.is_fault] == [*libraries.NEEDED]
    assert found["datasets"].do == "pip install datasets"
    assert found["transformers"].do.endswith("pip install 'bigtrain[hf]'")
    monkeypatch.setattr(libraries, "version_of", lambda _name: "1.0")
    assert {(finding.state, finding.text) for finding in library_findings()} == {("ok", "1.0")}
