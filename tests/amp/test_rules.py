"""Which precision runs where, and what is said where it does not."""

from __future__ import annotations

import subprocess
import sys

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from bigtrain.amp import rules

PRECISIONS = ["fp32", "bf16", "fp16", "fp8"]


@pytest.fixture
def torchao(monkeypatch: pytest.MonkeyPatch) -> None:
    """Make torchao seem installed."""
    monkeypatch.setattr(rules, "find_spec", lambda name: object() if name == "torchao" else None)


@pytest.mark.parametrize(
    ("kind", "capability", "can"),
    [
        ("cpu", None, ("fp32", "bf16")),
        ("cuda", (7, 5), ("fp32", "fp16")),
        ("cuda", (8, 0), ("fp32", "fp16", "bf16")),
        ("cuda", (8, 9), ("fp32", "fp16", "bf16", "fp8")),
        ("cuda", (12, 0), ("fp32", "fp16", "bf16", "fp8")),
        ("cuda", (5, 2), ("fp32",)),
        ("cuda", None, ("fp32", "fp16", "bf16", "fp8")),
    ],
)
def test_what_devices_can(kind: str, capability: tuple[int, int] | None, can: tuple[str, ...]) -> None:
    assert rules.supported(kind, capability) == can


@pytest.mark.usefixtures("torchao")
@pytest.mark.parametrize("precision", PRECISIONS)
@pytest.mark.parametrize(("kind", "capability"), [("cpu", None), ("cuda", (7, 5)), ("cuda", (9, 0)), ("cuda", None)])
def test_a_fault_is_what_is_not_supported(precision: str, kind: str, capability: tuple[int, int] | None) -> None:
    fault = rules.device_fault(precision, kind, capability)
    assert (fault is None) == (precision in rules.supported(kind, capability))
    assert fault is None or "\n" not in fault


def test_a_fault_names_the_device_and_what_it_can() -> None:
    assert rules.device_fault("fp16", "cpu") == "fp16 does not run on the CPU; it can fp32 and bf16"
    assert (
        rules.device_fault("fp8", "cuda", (8, 0))
        == "fp8 does not run on a CUDA device of compute capability 8.0; it can fp32, fp16 and bf16"
    )
    assert rules.device_fault("bf16", "cuda", (5, 2)) == (
        "bf16 does not run on a CUDA device of compute capability 5.2; it can fp32"
    )


def test_fp8_says_whether_the_device_or_the_library_is_missing(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(rules, "find_spec", lambda name: None)
    assert rules.device_fault("fp8", "cuda", (9, 0)) == (
        "fp8 needs torchao, which is not installed; install it (pip install torchao) or use bf16"
    )
    assert "compute capability 8.6" in str(rules.device_fault("fp8", "cuda", (8, 6)))
    assert "torchao" not in str(rules.device_fault("fp8", "cpu"))


@pytest.mark.parametrize("precision", PRECISIONS)
@pytest.mark.parametrize("master_weights", ["fp32", "split24", "none"])
def test_bf16_weights_go_with_bf16_alone(precision: str, master_weights: str) -> None:
    fault = rules.master_weights_fault(precision, master_weights)
    assert (fault is None) == (master_weights == "fp32" or precision == "bf16")
    assert fault is None or {precision, master_weights} <= set(fault.replace(";", "").replace(",", "").split())


@given(st.floats(1e-30, 1e30), st.sampled_from([-1, 1]))
def test_half_the_distance_is_what_moves_a_weight(size: float, sign: int) -> None:
    """Just above it the next number is nearer, just below it the same one; at powers of two only upwards."""
    weight = torch.tensor(sign * size, dtype=torch.float64).bfloat16()
    step = sign * rules.smallest_move(abs(float(weight)))
    moved, stays = ((weight.double() + factor * step).bfloat16() for factor in (1.001, 0.999))
    assert moved != weight
    assert stays == weight


def test_the_warning_has_the_numbers() -> None:
    warning = rules.slow_rate_warning(2e-5, 0.02, "none")
    assert warning == (
        "a learning rate of 2e-05 is too small for bf16 weights without master weights: those of size 0.02 are 0.00012 "
        "apart, so it takes at least 6.1e-05 to move one other than by chance; use amp.master_weights=split24"
    )


@pytest.mark.parametrize(
    ("rate", "size", "master_weights"),
    [
        (1e-4, 0.02, "none"),
        (2e-5, 0.02, "split24"),
        (2e-5, 0.02, "fp32"),
        (2e-5, 0.0, "none"),
        (2.0**-14, 0.02, "none"),
    ],
)
def test_no_warning_where_none_is_due(rate: float, size: float, master_weights: str) -> None:
    assert rules.slow_rate_warning(rate, size, master_weights) is None


def test_it_needs_no_torch() -> None:
    code = "import sys; sys.modules['torch'] = None; from bigtrain.amp import cost, rules; rules.supported('cpu')"
    subprocess.run([sys.executable, "-c", code], check=True)
