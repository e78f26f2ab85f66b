"""A model's forward and loss on a ledger: every parameter gets its gradient, and nothing is left behind."""

from __future__ import annotations

from typing import Any

import pytest

from bigtrain.config.model import NORM_EPS, ModelConfig
from bigtrain.ledger import Ledger, Storage
from bigtrain.models.cost import MicroBatch, ModelCost
from bigtrain.models.operations_cost import Numbers, Operations
from bigtrain.models.shape import parameter_shapes
from bigtrain.recompute.cost import run_block

FAMILIES = ("bert", "gpt", "llama")
NUMBERS = {"fp32": Numbers(), "bf16": Numbers(2, 4, 4, True), "accumulated": Numbers(2, 2, 4, True)}


def config_of(family: Any, *, tied: bool = True) -> ModelConfig:
    return ModelConfig(
        family=family,
        vocab_size=500,
        hidden_size=64,
        num_hidden_layers=2,
        num_attention_heads=4,
        num_key_value_heads=2 if family == "llama" else 4,
        intermediate_size=96,
        max_position_embeddings=64,
        initializer_range=0.02,
        norm_eps=NORM_EPS[family],
        tie_word_embeddings=tied,
    )


def run(
    config: ModelConfig, numbers: Numbers, policy: str = "none", chunk: int = 1000
) -> tuple[Ledger, dict[str, int]]:
    """Run forward and backward; returns the ledger and the bytes of each parameter's gradient."""
    ledger, gradients = Ledger(), dict[str, int]()
    gathered = config.family == "bert"
    batch = MicroBatch(128, 20 if gathered else 128, 64, gathered)
    cost = ModelCost(config, Operations(ledger, numbers), chunk, 0.1)
    loss, gradient = cost.loss(batch, lambda index, forward, x: run_block(ledger, policy, forward, x))

    def ready(name: str, storage: Storage) -> None:
        assert name not in gradients
        gradients[name] = storage.size

    ledger.backward(loss, gradient, ready)
    del loss, gradient
    return ledger, gradients


@pytest.mark.parametrize("policy", ["none", "selective", "full"])
@pytest.mark.parametrize("numbers", NUMBERS)
@pytest.mark.parametrize("tied", [True, False])
@pytest.mark.parametrize("family", FAMILIES)
def test_each_parameter_gets_one_gradient_of_its_size(family: str, tied: bool, numbers: str, policy: str) -> None:
    config, bytes_of = config_of(family, tied=tied), NUMBERS[numbers]
    ledger, gradients = run(config, bytes_of, policy)
    elements = {name: _product(shape) * bytes_of.gradient for name, shape in parameter_shapes(config).items()}
    assert gradients == elements
    assert ledger.now == 0
    assert not ledger.nodes


@pytest.mark.parametrize("family", FAMILIES)
def test_chunks_of_the_loss_bound_the_logits(family: str) -> None:
    config = config_of(family)
    whole, cut = (run(config, Numbers(), chunk=chunk)[0].peak for chunk in (1000, 8))
    assert cut <= whole


def test_the_batch_counts_positions_of_labels() -> None:
    cost = ModelCost(config_of("bert"), Operations(Ledger(), Numbers()), 1000)
    held = cost.batch(MicroBatch(100, 15, 50, gathered=True))
    assert sum(storage.size for storage in held) == 8 * (100 + 100 + 15 + 15)
    held = cost.batch(MicroBatch(100, 100, 50, gathered=False))
    assert sum(storage.size for storage in held) == 8 * 300


@pytest.mark.parametrize("family", FAMILIES)
def test_dropout_of_attention_keeps_probabilities(family: str) -> None:
    config, peaks = config_of(family), []
    for dropout in (0.0, 0.1):
        ledger = Ledger()
        cost = ModelCost(config, Operations(ledger, Numbers()), 1000, attention_dropout=dropout)
        loss, _ = cost.loss(MicroBatch(128, 128, 64, gathered=False), lambda index, forward, x: forward(x))
        peaks.append(ledger.peak)
        del loss
    assert peaks[1] > peaks[0]


def _product(shape: tuple[int, ...]) -> int:
    return shape[0] if len(shape) == 1 else shape[0] * shape[1]
