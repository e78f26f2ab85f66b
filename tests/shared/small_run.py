"""Small runs of an engine in this process, on any device, and all that they leave: to be compared bit by bit."""

from __future__ import annotations

import os
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from dataclasses import replace
from typing import Any, NamedTuple

import torch
from torch import Tensor

import bigtrain
from bigtrain.config.schema import Recipe
from bigtrain.engine import Engine
from bigtrain.planner import hardware
from bigtrain.planner.plan import Plan
from bigtrain.training.build import build_engine
from bigtrain.training.runtime import seed_step

LAYERS, WIDTH, ROWS, LENGTH, VOCABULARY = 3, 32, 8, 16, 90
STEPS = 20


class Trace(NamedTuple):
    """What a run leaves: numbers of each step, the first step's gradients, weights and optimizer state at its end."""

    losses: Tensor
    norms: Tensor
    gradients: dict[str, Tensor]
    weights: dict[str, Tensor]
    state: dict[str, Tensor]

    def equals(self, other: Trace) -> bool:
        """Tell whether two runs are bitwise the same, in all that both of them leave."""
        pairs = [(self.weights, other.weights), (self.state, other.state)]
        if self.gradients and other.gradients:
            pairs.append((self.gradients, other.gradients))
        same_tensors = all(
            one.keys() == two.keys() and all(torch.equal(one[name], two[name]) for name in one) for one, two in pairs
        )
        return same_tensors and torch.equal(self.losses, other.losses) and torch.equal(self.norms, other.norms)


def plan_of(
    family: str,
    *,
    policy: str | tuple[str, ...] = "none",
    micro: int = ROWS,
    dropout: float = 0.1,
    attention_dropout: float | None = None,
    precision: str = "fp32",
    master_weights: str = "fp32",
    state: str = "fp32",
    released: bool = False,
    clip: float | None = 1.0,
    width: int = WIDTH,
    length: int = LENGTH,
    compiled: bool = False,
    device: hardware.Hardware | None = None,
    objective: str = "",
    optimizer: str = "adamw",
    learning_rate: float = 1e-2,
    sharding: Mapping[str, Any] | None = None,
    budget: str | None = None,
) -> Plan:
    """Return the plan of a small run; `released` goes without clipping, as it must.

    Attention drops what the rest does, where it is not said.
    """
    recipe = Recipe.model_validate(
        {
            "name": "same",
            "model": {
                "family": family,
                "hidden_size": width,
                "num_hidden_layers": LAYERS,
                "num_attention_heads": 4,
                "intermediate_size": 5 * width,  # above 4096 elements, the least of which moments are quantized
                **({"num_key_value_heads": 2} if family == "llama" else {}),
            },
            "data": {"vocab_size": VOCABULARY, "sequence_length": length},
            "train": {
                "objective": objective or ("mlm" if family == "bert" else "clm"),
                "steps": STEPS,
                "global_batch_size": ROWS,
                "micro_batch_size": micro,
                "dropout": dropout,
                "attention_dropout": dropout if attention_dropout is None else attention_dropout,
                "max_grad_norm": None if released else clip,
                "compile": compiled,
            },
            "optimizer": {
                "name": optimizer,
                "learning_rate": learning_rate,
                "warmup_steps": 2,
                "weight_decay": 0.1,
                "state": state,
                "gradient_release": released,
            },
            "amp": {"precision": precision, "master_weights": master_weights},
            "recompute": {"policy": policy if isinstance(policy, str) else list(policy)},
            "sharding": dict(sharding or {}),
            "memory": {"budget": budget} if budget else {},
        }
    )
    return bigtrain.plan(recipe, device or hardware.cpu())


def rows(family: str, step: int, length: int = LENGTH) -> dict[str, Tensor]:
    """Packed rows of one or two documents and some padding; label counts differ from row to row."""
    generator = torch.Generator().manual_seed(step)
    # Low numbers are frequent, which there is to learn.
    ids = 5 + (torch.rand(ROWS, length, generator=generator).pow(3) * (VOCABULARY - 5)).long()
    # Few lengths that follow on each other: attention on the CPU goes from one length to the next.
    lengths = torch.tensor([[length - 1, 0]] * (ROWS - 1) + [[9 * length // 16, 6 * length // 16]])
    labels = torch.full_like(ids, -100)
    for row, (first, second) in enumerate(lengths.tolist()):
        if family == "bert":
            labels[row, : 1 + 2 * (row % 4)] = ids[row, : 1 + 2 * (row % 4)]
        else:
            skipped = row % 4
            labels[row, skipped : first - 1] = ids[row, 1 + skipped : first]
            labels[row, first : first + second - 1] = ids[row, first + 1 : first + second]
    return {"input_ids": ids, "labels": labels, "document_lengths": lengths.to(torch.int32)}


def changing_rows(family: str, step: int, length: int = LENGTH, *, many: bool = False) -> dict[str, Tensor]:
    """Packed rows of 1 to 5 documents, or of up to 20; lengths, padding and labels are each step's own."""
    generator = torch.Generator().manual_seed(step)
    ids, labels = rows(family, step, length)["input_ids"], torch.full((ROWS, length), -100)
    lengths = torch.zeros(ROWS, 20, dtype=torch.int32)
    for row in range(ROWS):
        documents = min(20, length // 2) if many else 1 + (row + step) % 5
        padding, labelled = (int(torch.randint(1, most, (1,), generator=generator)) for most in (length // 4, 7))
        held = length - padding
        ends = torch.cat([1 + torch.randperm(held - 1, generator=generator)[: documents - 1], torch.tensor([held])])
        ends = ends.sort().values
        lengths[row, :documents] = ends.diff(prepend=torch.zeros(1, dtype=torch.int64))
        if family == "bert":
            places = torch.randperm(held, generator=generator)[:labelled]
            labels[row, places] = ids[row, places]
        else:
            skipped = (row + step) % 4
            labels[row, skipped : held - 1] = ids[row, 1 + skipped : held]
            labels[row, ends - 1] = -100
    return {"input_ids": ids, "labels": labels, "document_lengths": lengths}


def with_pairs(rows: dict[str, Tensor]) -> dict[str, Tensor]:
    """Return rows whose documents are pairs of texts, with a label for each."""
    ids, lengths = rows["input_ids"], rows["document_lengths"]
    segments, labels = torch.arange(ids.shape[1]) % 5 > 2, (ids[:, :2] % 2).masked_fill(lengths == 0, -100)
    return {**rows, "segment_ids": segments.long().repeat(len(ids), 1), "next_sentence_labels": labels}


def follow(plan: Plan, steps: int = STEPS) -> Trace:
    """Train as the shipped loop does."""
    engine, losses, norms, gradients = build_engine(plan), [], [], {}
    for step in range(steps):
        pass_through(engine, plan, step)
        if step == 0:
            gradients = {n: p.grad.clone() for n, p in engine.model.named_parameters() if p.grad is not None}
        result = engine.step(plan.recipe.train.max_grad_norm)
        assert not result.skipped
        losses.append(result.loss)
        norms.append(result.grad_norm)
    weights = {name: p.detach() for name, p in engine.model.named_parameters()}
    state = {
        f"{name}.{key}": value
        for name, p in engine.model.named_parameters()
        for key, value in engine.optimizer.state[p].items()
    }
    return Trace(torch.stack(losses), torch.stack(norms), gradients, weights, state)


def pass_through(engine: Engine, plan: Plan, step: int, batch: dict[str, Tensor] | None = None) -> None:
    """Run forward and backward of a step's rows, or of a batch."""
    seed_step(plan.recipe.seed, step)
    if batch is None:
        batch = rows(plan.model.family, step, plan.recipe.data.sequence_length)
        batch = with_pairs(batch) if plan.model.next_sentence else batch
    for micro in engine.micro_batches(batch):
        engine.backward(engine.model(**micro))


def hardware_of(device: str) -> hardware.Hardware:
    """Return this machine's CPU, or one of its GPUs."""
    if device == "cpu":
        return hardware.cpu()
    found = hardware.cuda_devices()
    assert found is not None
    return replace(found, devices=1)


@contextmanager
def deterministic(device: str) -> Iterator[None]:
    """Have kernels on a GPU give the same numbers each time."""
    before = os.environ.get("CUBLAS_WORKSPACE_CONFIG")
    os.environ.setdefault("CUBLAS_WORKSPACE_CONFIG", ":4096:8")
    torch.use_deterministic_algorithms(device == "cuda")
    try:
        yield
    finally:
        torch.use_deterministic_algorithms(False)
        if before is None:
            del os.environ["CUBLAS_WORKSPACE_CONFIG"]
