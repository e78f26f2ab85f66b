"""What an engine tells of a step."""

from __future__ import annotations

from collections.abc import Mapping

import torch
from torch import Tensor


class StepResult:
    """What one optimizer step did.

    `loss` (fp64) is the mean over the labelled tokens of the global batch, or the sum of such means where a model
    learns several tasks, whose `parts` are there by name; `grad_norm` (fp32) the global norm before clipping,
    `loss_scale` what the loss was multiplied by: 0-dim tensors on the model's device. `skipped` says that loss or
    gradient was not finite and nothing was changed; reading it waits until a GPU has taken the step.
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
        if finite.is_cuda:
            self._finite = torch.empty((), dtype=torch.bool, pin_memory=True).copy_(finite, non_blocking=True)
            self._copied = torch.cuda.current_stream(finite.device).record_event()

    @property
    def skipped(self) -> bool:
        if self._copied is not None:
            self._copied.synchronize()
        return not self._finite
