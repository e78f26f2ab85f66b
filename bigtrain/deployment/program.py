"""A trained model as a program of torch.export, in a .pt2 file: any batch, any length, and no bigtrain to run it."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import torch
from torch.export import Dim, ExportedProgram, export

from bigtrain.deployment.module import PaddedModel
from bigtrain.models.language_model import LanguageModel

EXAMPLE_ROWS, EXAMPLE_LENGTH = 2, 7
"""Rows and length that the program is traced with; two different numbers, and neither is 1, stay two open ones."""

INPUTS = ("input_ids", "attention_mask")


def trace(model: LanguageModel) -> ExportedProgram:
    """Return the program that takes `input_ids` and `attention_mask` (B, L) int64 and returns logits (B, L, V) fp32.

    It holds the model's own weights, not a copy. Where positions are learned, L is at most how many there are.
    """
    config = model.config
    longest = config.max_position_embeddings
    length = min(EXAMPLE_LENGTH, longest)
    rows = EXAMPLE_ROWS if length != EXAMPLE_ROWS else EXAMPLE_ROWS + 1
    # Two tensors: of one that is given twice, the program would read the first input alone.
    ids, mask = (torch.ones(rows, length, dtype=torch.int64) for _ in INPUTS)
    most: dict[str, Any] = {} if config.family == "llama" else {"max": longest}
    dims = {0: Dim("batch", min=1), 1: Dim("length", min=1, **most)}
    module = PaddedModel(model).requires_grad_(False)
    with torch.no_grad():
        return export(module, (ids, mask), dynamic_shapes=dict.fromkeys(INPUTS, dims))


def write_pt2(program: ExportedProgram, file: Path) -> None:
    """Write a program as a .pt2 file; one tensor at a time is copied on the way."""
    torch.export.save(program, file)
