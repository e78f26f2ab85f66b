"""Small models of each family with random weights, traced once for all that is asked of them."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
import torch
from shapes import small_shape
from torch.export import ExportedProgram

from bigtrain.deployment.program import trace
from bigtrain.models.build import build_model
from bigtrain.models.language_model import LanguageModel

LONGEST = 24


def make(family: str) -> LanguageModel:
    """Return a model whose every weight is random; heads are shared where the family can."""
    config = small_shape(family, max_position_embeddings=LONGEST, initializer_range=0.1)
    with torch.random.fork_rng(), torch.no_grad():
        torch.manual_seed(5)
        model = build_model(config)
        for name, parameter in model.named_parameters():
            if "norm" in name or name.endswith("bias"):
                parameter[:100] += 0.1 * torch.randn_like(parameter[:100])
    return model.eval()


@pytest.fixture(scope="session", params=["bert", "gpt", "llama"])
def traced(request: pytest.FixtureRequest) -> tuple[LanguageModel, ExportedProgram]:
    """Return a model and its program."""
    model = make(request.param)
    return model, trace(model)


@pytest.fixture(scope="session")
def padded() -> Callable[..., Any]:
    """Return a maker of batches: ids, and a mask with padding after, before, and nowhere."""

    def batch(rows: int, length: int) -> tuple[torch.Tensor, torch.Tensor]:
        ids = torch.randint(0, 100, (rows, length), generator=torch.Generator().manual_seed(rows * 100 + length))
        mask = torch.ones_like(ids)
        mask[0, (length + 2) // 2 :] = 0
        if rows > 1:
            mask[1, : length // 3] = 0
        return ids, mask

    return batch


@pytest.fixture(scope="session")
def right_logits() -> Callable[..., torch.Tensor]:
    """Return what the model itself makes of each row without its padding, end to end: (tokens, V)."""

    def read(model: LanguageModel, ids: torch.Tensor, mask: torch.Tensor) -> torch.Tensor:
        lengths = mask.sum(1)
        bounds = torch.cat((torch.zeros(1), lengths.cumsum(0))).to(torch.int32)
        positions = torch.cat([torch.arange(int(length)) for length in lengths])
        with torch.no_grad():
            return model.logits(ids[mask.bool()], positions, bounds)

    return read
