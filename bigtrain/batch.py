"""The Batch type: names to tensors, one row of each tensor a sequence."""

from __future__ import annotations

from collections.abc import Mapping
from typing import TYPE_CHECKING, TypeAlias

if TYPE_CHECKING:
    from torch import Tensor

Batch: TypeAlias = "Mapping[str, Tensor]"

IGNORED_LABEL = -100
"""The label of a position that does not count, as in torch and transformers."""
