"""Small decoders whose every weight is random."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
import torch
from shapes import small_shape

from bigtrain.models.build import build_model
from bigtrain.models.language_model import LanguageModel


@pytest.fixture
def decoder(torch_seed: int) -> Callable[..., LanguageModel]:
    """Return a maker of small decoders: `decoder("llama", max_position_embeddings=8)`."""

    def make(family: str, **changes: Any) -> LanguageModel:
        model = build_model(small_shape(family, **{"initializer_range": 0.2, **changes}))
        with torch.no_grad():
            for name, parameter in model.named_parameters():
                if "norm" in name or name.endswith("bias"):
                    parameter += 0.1 * torch.randn_like(parameter)
        return model.eval()

    return make


@pytest.fixture
def flat_logits() -> Callable[..., torch.Tensor]:
    """Return what the model itself says follows each token of a row, as it reads in training: (L, V)."""

    def read(model: LanguageModel, row: list[int]) -> torch.Tensor:
        bounds = torch.tensor([0, len(row)], dtype=torch.int32)
        with torch.no_grad():
            return model.logits(torch.tensor(row), torch.arange(len(row)), bounds)

    return read
