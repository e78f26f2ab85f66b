"""Flat batches of one shape: what compiled code, the allocator and variable-length kernels meet is the same each time.

Of B rows of T positions a flat batch has B x T tokens then, as if nothing were unpadded: what is left is filled with
documents that carry no label, after all others. Nobody attends to them, so that loss and gradients stay what they are.
That is for rows which packing all but fills; elsewhere the filling would cost what unpadding saves.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import torch
from torch import Tensor
from torch.nn.functional import pad

from bigtrain.batch import IGNORED_LABEL, PAIR_LABELS
from bigtrain.memory.predict import micro_batch
from bigtrain.models.attention_cost import LEAST_DOCUMENTS
from bigtrain.planner.module_plan import ModulePlan
from bigtrain.planner.plan import Plan


class StaticShapes:
    """Fill flat batches to the shape that rows of their size always have; `labels_per_row` where they are gathered.

    The places for `documents` double when a batch has more: a bound that no row can exceed would be far above, and
    attention's kernels begin some work, and hold some memory, for each place. So they grow a few times at most, and
    places without a document are documents of length 0 at the end, which change no result.
    """

    def __init__(
        self, labels_per_row: int | None = None, tokens: int | None = None, documents: int = LEAST_DOCUMENTS
    ) -> None:
        self._labels_per_row = labels_per_row
        self.tokens = tokens
        """Of a plan's micro-batches, whose rows are all there."""
        self.documents = documents

    def fill(self, flat: Mapping[str, Any], rows: int, row_length: int) -> dict[str, Any]:
        """Return a flat batch, as `bigtrain.batch.unpad` makes it, of so many rows of so many positions, filled up.

        More labels than rows of their number should have stay as they are: a user's own data may be like that.
        """
        missing = rows * row_length - len(flat["input_ids"])
        lengths = _cut(missing, row_length)
        boundaries = self._boundaries(flat["cu_seqlens"], lengths)
        positions = [torch.arange(length) for length in lengths]
        filled = {
            **flat,
            "input_ids": pad(flat["input_ids"], (0, missing)),
            "position_ids": torch.cat([flat["position_ids"], *positions]),
            "cu_seqlens": boundaries,
            "max_seqlen": row_length,
        }
        if "labels" in flat:
            filled |= self._labels(flat["labels"], flat.get("label_positions"), rows, missing)
        if PAIR_LABELS in flat:
            filled["segment_ids"] = pad(flat["segment_ids"], (0, missing))
            filled[PAIR_LABELS] = _ignored(flat[PAIR_LABELS], len(boundaries) - 1 - len(flat[PAIR_LABELS]))
        return filled

    def _labels(self, labels: Tensor, positions: Tensor | None, rows: int, missing: int) -> dict[str, Tensor]:
        """Return labels of all tokens, or where rows have few, gathered ones; those added do not count."""
        if positions is None and self._labels_per_row is None:
            return {"labels": _ignored(labels, missing)}
        if positions is None:
            positions = (labels != IGNORED_LABEL).nonzero().squeeze(1)
            labels = labels[positions]
        more = max(0, (self._labels_per_row or 0) * rows - len(labels))
        return {"label_positions": pad(positions, (0, more)), "labels": _ignored(labels, more)}

    def _boundaries(self, cu_seqlens: Tensor, more: list[int]) -> Tensor:
        """Return the boundaries with those of further documents, and of empty ones up to the places that there are."""
        last = int(cu_seqlens[-1])
        ends = last + torch.tensor(more, dtype=torch.int64).cumsum(0)
        found = torch.cat([cu_seqlens, ends.to(cu_seqlens.dtype)])
        while self.documents < len(found) - 1:
            self.documents *= 2
        return pad(found, (0, self.documents + 1 - len(found)), value=last + sum(more))


def static_shapes(plan: Plan) -> StaticShapes | None:
    """Return what fills a plan's flat batches: on CUDA, where documents are packed; elsewhere nothing does.

    Nor of a model that no recipe describes: nobody said what its rows are like.
    """
    if plan.hardware.kind != "cuda" or not plan.recipe.data.packing or isinstance(plan, ModulePlan):
        return None
    one, all_rows = (micro_batch(plan.recipe, rows) for rows in (1, plan.micro_batch_size))
    return StaticShapes(one.labels if one.gathered else None, all_rows.tokens, all_rows.documents)


def _cut(tokens: int, longest: int) -> list[int]:
    """Cut so many tokens into documents, all but the last as long as a row."""
    count, rest = divmod(tokens, longest)
    return [longest] * count + ([rest] if rest else [])


def _ignored(labels: Tensor, more: int) -> Tensor:
    return pad(labels, (0, more), value=IGNORED_LABEL)
