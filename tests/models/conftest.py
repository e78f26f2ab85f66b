"""Small shapes of each family, and flat batches."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

import pytest
import torch
from shapes import small_shape
from torch.profiler import ProfilerActivity, profile

from bigtrain.config.model import ModelConfig

FAMILIES = ("bert", "gpt", "llama")
VOCAB_SIZE = 100
"""Not a multiple of 64, so that there is padding."""


@pytest.fixture
def tiny() -> Callable[..., ModelConfig]:
    """Return a maker of small shapes: `tiny("llama", num_hidden_layers=1)`."""

    def make(family: str, **changes: Any) -> ModelConfig:
        return small_shape(family, **{"vocab_size": VOCAB_SIZE, "initializer_range": 0.1, **changes})

    return make


@pytest.fixture
def flat_row() -> Callable[..., dict[str, Any]]:
    """Return a maker of flat batches, from documents as lists of ids and their labels (None: each next token)."""

    def make(documents: Sequence[torch.Tensor], labels: Sequence[torch.Tensor] | None = None) -> dict[str, Any]:
        if labels is None:
            end = torch.tensor([-100])
            labels = [torch.cat((document[1:], end)) for document in documents]
        lengths = [len(document) for document in documents]
        row = torch.cat(list(labels))
        at = (row != -100).nonzero()[:, 0]
        return {
            "input_ids": torch.cat(list(documents)),
            "position_ids": torch.cat([torch.arange(length) for length in lengths]),
            "cu_seqlens": torch.tensor([0, *lengths]).cumsum(0).to(torch.int32),
            "label_positions": at,
            "labels": row[at],
            "max_seqlen": max(lengths),
        }

    return make


@pytest.fixture
def documents(torch_seed: int) -> list[torch.Tensor]:
    """Return documents of uneven lengths, with neighbours of equal length among them, and one of a single token."""
    return [torch.randint(0, VOCAB_SIZE, (length,)) for length in (7, 12, 12, 1, 3, 7, 7)]


@pytest.fixture
def allocations() -> Callable[[Callable[[], object]], list[int]]:
    """Return a function that runs another and lists the bytes that it took on the CPU, freed ones negative, in order.

    What it returns lives until the end of the list.
    """

    def record(run: Callable[[], object]) -> list[int]:
        with profile(activities=[ProfilerActivity.CPU], profile_memory=True) as recorded:
            result = run()
        del result
        events = [event for event in recorded.profiler.kineto_results.events() if event.name() == "[memory]"]
        return [event.nbytes() for event in sorted(events, key=lambda event: event.start_ns())]

    return record
