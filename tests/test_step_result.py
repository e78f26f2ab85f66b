"""What a step tells: its numbers as they are, and whether it changed anything."""

from __future__ import annotations

import pytest
import torch

import bigtrain
from bigtrain.step_result import StepResult


def result(finite: bool, device: str = "cpu") -> StepResult:
    loss = torch.tensor(2.5, dtype=torch.float64, device=device)
    norm, scale = torch.tensor(0.5, device=device), torch.tensor(4.0, device=device)
    return StepResult(loss, norm, torch.tensor(finite, device=device), 1e-3, scale)


@pytest.mark.parametrize("finite", [True, False])
def test_a_step_that_was_not_finite_was_skipped(finite: bool) -> None:
    found = result(finite)
    assert found.skipped is (not finite) or found.skipped == torch.tensor(not finite)
    assert (float(found.loss), float(found.grad_norm), float(found.loss_scale)) == (2.5, 0.5, 4.0)
    assert found.learning_rate == 1e-3


def test_it_is_public() -> None:
    assert bigtrain.StepResult is StepResult


@pytest.mark.gpu
@pytest.mark.parametrize("finite", [True, False])
def test_a_gpu_is_asked_once_it_has_taken_the_step(finite: bool) -> None:
    found = result(finite, "cuda")
    assert not found._finite.is_cuda and found._finite.is_pinned()
    assert bool(found.skipped) == (not finite)
