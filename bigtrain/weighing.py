"""How much each micro-batch counts in a step, so that where a batch is cut changes nothing; and the loss it adds up to.

A model has one loss, the mean over labelled tokens, or several, of which each is a mean over things of its own: of
masked tokens and of pairs of texts. Each counts in a micro-batch by the share of its things that lie there.
"""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

import torch
from torch import Tensor

from bigtrain import batch as batches
from bigtrain.batch import Batch, PairLosses
from bigtrain.errors import DataError
from bigtrain.world import World


class Weighing:
    """The shares of the micro-batch under way, one for each loss of the model, and the weighted losses of a step."""

    def __init__(self, device: torch.device, world: World, *, shifted_labels: bool) -> None:
        self._world, self._shifted_labels = world, shifted_labels
        self._shares = [0.0]
        self.loss = torch.zeros((), dtype=torch.float64, device=device)
        """The step's loss so far, of this rank's rows: as often too large as there are ranks."""
        self.parts: dict[str, Tensor] = {}
        """What it is made of, by name; empty for a model with one loss."""

    def cut(self, batch: Batch, micro_batch_size: int) -> Iterator[tuple[Batch, bool]]:
        """Yield this rank's micro-batches, and whether each is the last; those with no label anywhere are left out.

        Raises DataError if no row of any rank has a label.
        """
        shifted = self._shifted_labels and not batches.is_packed(batch)
        parts = list(batches.split(batch, micro_batch_size))
        counts = [batches.count_weights(rows, shifted=shifted) for rows in parts]
        losses = len(counts[0])
        everywhere = self._world.sum([count for of_part in counts for count in of_part])
        totals = [sum(everywhere[loss::losses]) for loss in range(losses)]
        wanted = [index for index in range(len(parts)) if any(everywhere[index * losses : (index + 1) * losses])]
        if not wanted:
            raise DataError("a batch has no label that counts; check the data")
        for index in wanted:
            rows = parts[index] if counts[index][0] else batches.labelled(parts[index])
            # Gradients are averaged over ranks, so that each rank's counts as often as there are ranks.
            of_part = zip(counts[index], totals, strict=True)
            self._shares = [count / total * self._world.size if total else 0.0 for count, total in of_part]
            yield rows, index == wanted[-1]

    def weighted(self, loss: Any) -> Tensor:
        """Return a micro-batch's part of the step's loss, and add it up; `loss` is as for `Engine.backward`."""
        if isinstance(loss, PairLosses):
            found = [mean * share for mean, share in zip(loss, self._shares, strict=True)]
            for name, part in zip(loss._fields, found, strict=True):
                self.parts[name] = self.parts.get(name, torch.zeros_like(self.loss)) + part.detach()
            weighted = found[0] + found[1]
        else:
            mean: Tensor = loss if isinstance(loss, Tensor) else loss.loss
            weighted = mean * self._shares[0]
        self.loss += weighted.detach()
        return weighted

    def share_of_losses(self) -> list[Tensor]:
        """Return what this rank adds to the loss of all ranks, and to each of its parts."""
        return [loss / self._world.size for loss in (self.loss, *self.parts.values())]

    def set_losses(self, losses: Tensor) -> Tensor:
        """Take the sums over all ranks of what each of them adds, as in `share_of_losses`; return the loss."""
        self.parts = dict(zip(self.parts, losses[1:], strict=True))
        return losses[0]

    def restart(self) -> None:
        """Begin a new step."""
        self.loss, self.parts = torch.zeros_like(self.loss), {}
