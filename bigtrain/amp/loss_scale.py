"""The factor that keeps small fp16 gradients from becoming zero: it follows the overflows, without leaving the device.

Micikevicius et al. 2017, arXiv 1710.03740, section 3.2.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping

import torch
import torch.distributed as dist
from torch import Tensor

START = 2.0**16
SMALLEST, LARGEST = 1.0, 2.0**24
GROWTH_STEPS = 2000
"""Steps without an overflow after which the scale doubles."""


class LossScale:
    """A loss scale, constant 1 for precisions that need none; nothing here waits for the device.

    In a step: differentiate `scale(loss)` of each micro-batch, call `unscale_` on the gradients once, leave out the
    update where it found an overflow, then call `update`.
    """

    def __init__(self, device: torch.device | str, *, precision: str = "fp16") -> None:
        self.dynamic = precision == "fp16"
        self._scale = torch.full((), START if self.dynamic else 1.0, dtype=torch.float32, device=device)
        self._good_steps = torch.zeros((), dtype=torch.int64, device=device)

    @property
    def value(self) -> Tensor:
        """The present factor, a 0-dim fp32 tensor."""
        return self._scale

    def scale(self, loss: Tensor) -> Tensor:
        """Return the loss times the factor."""
        return loss * self._scale if self.dynamic else loss

    @torch.no_grad()
    def unscale_(self, gradients: Iterable[Tensor]) -> Tensor:
        """Divide gradients by the factor in place; return 1 if a number in them is not finite on any rank, else 0.

        The answer is a 0-dim fp32 tensor on the device, the same on all ranks, so that all leave the step out or none.
        A constant scale looks at no gradient and answers 0.
        """
        found = torch.zeros_like(self._scale)
        if not self.dynamic:
            return found
        inverse = self._scale.reciprocal()
        for alike in _alike(gradients):
            here = found.to(alike[0].device)  # of offloaded ones, the host
            torch._amp_foreach_non_finite_check_and_unscale_(alike, here, inverse.to(here.device))
            found = torch.maximum(found, here.to(found.device))
        if dist.is_initialized():
            dist.all_reduce(found, dist.ReduceOp.MAX)
        return found

    @torch.no_grad()
    def update(self, found: Tensor) -> None:
        """Halve the factor after an overflow, double it after GROWTH_STEPS steps without one, within its bounds."""
        if not self.dynamic:
            return
        overflow = found > 0
        good_steps = torch.where(overflow, 0, self._good_steps + 1)
        grown = good_steps >= GROWTH_STEPS
        factor = torch.where(overflow, 0.5, torch.where(grown, 2.0, 1.0))
        self._scale.mul_(factor).clamp_(SMALLEST, LARGEST)
        self._good_steps.copy_(torch.where(grown, 0, good_steps))

    def state_dict(self) -> dict[str, float]:
        """Return the factor and the steps since its last change, as numbers, which waits for the device."""
        return {"scale": self._scale.item(), "good_steps": self._good_steps.item()}

    def load_state_dict(self, state: Mapping[str, float]) -> None:
        """Take over what `state_dict` returned."""
        self._scale.fill_(state["scale"])
        self._good_steps.fill_(state["good_steps"])


def _alike(gradients: Iterable[Tensor]) -> Iterable[list[Tensor]]:
    """Return the gradients in lists of one dtype and device, as the fused check wants them."""
    alike: dict[tuple[torch.dtype, torch.device], list[Tensor]] = {}
    for gradient in gradients:
        alike.setdefault((gradient.dtype, gradient.device), []).append(gradient)
    return alike.values()
