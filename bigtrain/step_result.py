"""What an engine tells of a step."""

from __future__ import annotations

from collections.abc import Mapping
from typing import NamedTuple

import torch
from torch import Tensor


class StepNumbers(NamedTuple):
    """A step's numbers on the host; of a model that learns several tasks, the `parts` of its loss by name."""

    loss: float
    grad_norm: float
    loss_scale: float
    parts: Mapping[str, float]


class StepResult:
    """What one optimizer step did.

    `loss` (fp64) is the mean over the labelled tokens of the global batch, or the sum of such means where a model
    learns several tasks, whose `parts` are there by name; `grad_norm` (fp32) the global norm before clipping,
    `loss_scale` what the loss was multiplied by: 0-dim tensors on the model's device. `skipped` says that loss or
    gradient was not finite and nothing was changed. A GPU sends all of them to the host as soon as it has taken the
    step: `skipped` and `numbers` wait until then, and once the next step is enqueued that costs the GPU nothing.
    """

    def __init__(
        self,
        loss: Tensor,
        grad_norm: Tensor,
        finite: Tensor,
        learning_rate: float,
        loss_scale: Tensor,
        *,
        parts: Mapping[str, Tensor] | None = None,
    ) -> None:
        self.parts: Mapping[str, Tensor] = parts or {}
        self.loss, self.grad_norm, self.learning_rate, self.loss_scale = loss, grad_norm, learning_rate, loss_scale
        self._finite, self._copied = finite, None
        self._sent: Tensor | None = None
        if finite.is_cuda:
            self._sent = _sent(finite, loss, grad_norm, loss_scale, *self.parts.values())
            self._finite = self._sent[0]
            self._copied = torch.cuda.current_stream(finite.device).record_event()

    @property
    def skipped(self) -> bool:
        self._wait()
        return not self._finite

    @property
    def numbers(self) -> StepNumbers:
        self._wait()
        if self._sent is None:
            parts = {name: float(part) for name, part in self.parts.items()}
            return StepNumbers(float(self.loss), float(self.grad_norm), float(self.loss_scale), parts)
        _, loss, norm, scale, *rest = self._sent.tolist()
        return StepNumbers(loss, norm, scale, dict(zip(self.parts, rest, strict=True)))

    def _wait(self) -> None:
        if self._copied is not None:
            self._copied.synchronize()


def _sent(finite: Tensor, *numbers: Tensor) -> Tensor:
    """Begin to copy numbers of a GPU into one small buffer of pinned memory, fp64, which holds fp32 as it is."""
    found = torch.stack([number.detach().to(finite.device, torch.float64) for number in (finite, *numbers)])
    return torch.empty(found.shape, dtype=found.dtype, pin_memory=True).copy_(found, non_blocking=True)
