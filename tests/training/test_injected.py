"""What fault points change: the loss, the gradients alone, one bit."""

from __future__ import annotations

from types import SimpleNamespace

import pytest
import torch

from bigtrain import fault_points
from bigtrain.batch import PairLosses
from bigtrain.training.injected import changed, flip_asked_bit, flip_bit


def ask(monkeypatch: pytest.MonkeyPatch, text: str) -> None:
    monkeypatch.setattr(fault_points, "_ASKED", fault_points.parse(text))


def test_without_a_fault_nothing_changes() -> None:
    output = SimpleNamespace(loss=torch.ones(()))
    assert changed(output, 3) is output
    flip_asked_bit(iter([]), 3)


def test_a_changed_loss_is_that_many_times_as_large(monkeypatch: pytest.MonkeyPatch) -> None:
    ask(monkeypatch, "loss:change=20:step=3")
    assert changed(torch.tensor(2.0), 3) == 40
    assert changed(torch.tensor(2.0), 4) == 2


def test_both_losses_of_pairs_change(monkeypatch: pytest.MonkeyPatch) -> None:
    ask(monkeypatch, "loss:change=20:step=3")
    output = PairLosses(torch.tensor(2.0), torch.tensor(1.0))
    assert changed(output, 3) == (40, 20)
    assert changed(output, 4) is output


@pytest.mark.parametrize("number", ["nan", "inf", "-inf", "3"])
def test_changed_gradients_leave_the_loss(monkeypatch: pytest.MonkeyPatch, number: str) -> None:
    ask(monkeypatch, f"gradient:change={number}")
    weight = torch.tensor(2.0, requires_grad=True)
    loss = changed(SimpleNamespace(loss=weight * weight), 0)
    loss.backward()
    assert loss == 4
    assert weight.grad is not None
    torch.testing.assert_close(weight.grad, torch.tensor(4 * float(number)), equal_nan=True)


def test_a_bit_is_flipped_and_flipped_back(monkeypatch: pytest.MonkeyPatch) -> None:
    tensors = [torch.zeros(3), torch.zeros(2, dtype=torch.bfloat16)]
    flip_bit(tensors, 96 + 16 + 7)
    assert tensors[0].tolist() == [0, 0, 0]
    assert tensors[1].view(torch.int16).tolist() == [0, 128]
    ask(monkeypatch, f"weights:change={96 + 16 + 7}")
    flip_asked_bit(tensors, 0)
    assert not any(tensor.any() for tensor in tensors)


def test_a_bit_that_is_not_there() -> None:
    with pytest.raises(IndexError):
        flip_bit([torch.zeros(1)], 32)
