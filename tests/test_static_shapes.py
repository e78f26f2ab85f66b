"""Flat batches of one shape: fixed sizes, and the loss and the gradients that they have without."""

from __future__ import annotations

import dataclasses
from typing import Any

import pytest
import torch
from torch import Tensor, nn

import bigtrain
from bigtrain.batch import IGNORED_LABEL, PairLosses, unpad
from bigtrain.config.model import ModelConfig
from bigtrain.config.schema import Recipe
from bigtrain.memory.predict import micro_batch
from bigtrain.models import build_model
from bigtrain.planner import hardware
from bigtrain.planner.module_plan import ModulePlan
from bigtrain.planner.plan import Plan
from bigtrain.static_shapes import LEAST_DOCUMENTS, StaticShapes, static_shapes

ROWS, LENGTH, VOCABULARY = 4, 32, 90


def rows(lengths: list[list[int]], *, labels: int, pairs: bool = False) -> dict[str, Tensor]:
    """Return rows of documents of these lengths, of which each row has so many labels."""
    torch.manual_seed(1)
    ids = torch.randint(5, VOCABULARY, (len(lengths), LENGTH))
    found = {"input_ids": ids, "labels": torch.full_like(ids, IGNORED_LABEL)}
    found["labels"][:, :labels] = ids[:, :labels]
    found["document_lengths"] = torch.zeros(len(lengths), max(map(len, lengths)), dtype=torch.int32)
    for row, of_row in enumerate(lengths):
        found["document_lengths"][row, : len(of_row)] = torch.tensor(of_row)
    if pairs:
        present = found["document_lengths"] > 0
        found["segment_ids"] = (torch.arange(LENGTH) % 3 // 2).repeat(len(lengths), 1)
        found["next_sentence_labels"] = torch.where(present, torch.arange(present.shape[1]) % 2, IGNORED_LABEL)
    return found


FULL = [[LENGTH]] * ROWS
SHORT = [[20, 8], [5], [32], [1, 2, 3, 20]]


def plan(*, packing: bool = True, **train: Any) -> Plan:
    recipe = Recipe.model_validate(
        {
            "name": "tiny",
            "model": {"family": "bert", "hidden_size": 32, "num_hidden_layers": 2, "num_attention_heads": 2},
            "data": {"vocab_size": VOCABULARY, "sequence_length": LENGTH, "packing": packing},
            "train": {"objective": "mlm", "steps": 10, "global_batch_size": 8, **train},
            "optimizer": {"learning_rate": 1e-3},
        }
    )
    return bigtrain.plan(recipe, hardware.cpu())


def model(family: Any, **more: Any) -> nn.Module:
    torch.manual_seed(0)
    shape = plan().model
    config: ModelConfig = dataclasses.replace(shape, family=family, **more)
    return build_model(config)


def found_by(built: nn.Module, flat: dict[str, Any]) -> list[Tensor]:
    """Return the loss, or the losses, of a flat batch, and all gradients."""
    built.zero_grad()
    out = built(**flat)
    losses = [*out] if isinstance(out, PairLosses) else [out]
    sum(losses).backward()  # type: ignore[union-attr]
    return [loss.detach() for loss in losses] + [p.grad.clone() for p in built.parameters() if p.grad is not None]


@pytest.mark.parametrize(
    ("family", "labels", "pairs"), [("bert", 5, False), ("bert", 5, True), ("gpt", 30, False), ("llama", 30, False)]
)
def test_filling_changes_neither_loss_nor_gradients(family: str, labels: int, pairs: bool) -> None:
    built = model(family, next_sentence=pairs) if family == "bert" else model(family)
    for lengths in (FULL, SHORT):
        flat = unpad(rows(lengths, labels=labels, pairs=pairs))
        filled = StaticShapes(labels if labels < LENGTH // 2 else None).fill(flat, ROWS, LENGTH)
        assert len(filled["input_ids"]) == ROWS * LENGTH
        exact = lengths is FULL and not pairs  # of pairs there are more, whose products run in another shape
        for one, other in zip(found_by(built, flat), found_by(built, filled), strict=True):
            if exact:
                assert torch.equal(one, other)
            torch.testing.assert_close(one, other, rtol=1e-5, atol=1e-6)


@pytest.mark.parametrize("pairs", [False, True])
def test_an_evaluation_is_the_same(pairs: bool) -> None:
    built, flat = model("bert", next_sentence=pairs), unpad(rows(SHORT, labels=5, pairs=pairs))
    scores = [built.evaluate(**batch) for batch in (flat, StaticShapes(5).fill(flat, ROWS, LENGTH))]  # type: ignore[operator]
    for one, other in zip(*scores, strict=True):
        torch.testing.assert_close(one, other, rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize("pairs", [False, True])
def test_every_batch_of_so_many_rows_has_one_shape(pairs: bool) -> None:
    shapes, seen = StaticShapes(labels_per_row=5, documents=16), set()
    for lengths in (FULL, SHORT, [[1]] * ROWS, [[16, 16]] * ROWS):
        filled = shapes.fill(unpad(rows(lengths, labels=5, pairs=pairs)), ROWS, LENGTH)
        boundaries = filled["cu_seqlens"]
        assert boundaries.dtype == torch.int32
        assert int(boundaries[-1]) == ROWS * LENGTH
        assert 0 <= int(boundaries.diff().min()) <= int(boundaries.diff().max()) <= LENGTH
        assert int(filled["position_ids"].max()) < LENGTH
        seen.add(
            tuple((name, value if isinstance(value, int) else value.shape) for name, value in sorted(filled.items()))
        )
    assert len(seen) == 1


def test_places_for_documents_grow_by_powers_of_two_and_stay() -> None:
    shapes = StaticShapes(5)
    counts = []
    for documents in (1, 3, 1):
        filled = shapes.fill(unpad(rows([[2] * documents] * ROWS, labels=1)), ROWS, LENGTH)
        counts.append(len(filled["cu_seqlens"]) - 1)
    assert counts == [LEAST_DOCUMENTS, 2 * LEAST_DOCUMENTS, 2 * LEAST_DOCUMENTS]


def test_more_labels_than_rows_should_have_stay() -> None:
    filled = StaticShapes(labels_per_row=1).fill(unpad(rows(FULL, labels=5)), ROWS, LENGTH)
    assert len(filled["labels"]) == 5 * ROWS


def test_without_labels_there_are_none() -> None:
    given = rows(SHORT, labels=5)
    del given["labels"]
    assert set(StaticShapes(5).fill(unpad(given), ROWS, LENGTH)) == {
        "input_ids",
        "position_ids",
        "cu_seqlens",
        "max_seqlen",
    }


def on_cuda(found: Plan) -> Plan:
    return dataclasses.replace(found, hardware=dataclasses.replace(found.hardware, kind="cuda"))


def test_shapes_are_static_on_cuda_where_documents_are_packed() -> None:
    assert static_shapes(plan()) is None
    assert static_shapes(on_cuda(plan(packing=False))) is None
    found = static_shapes(on_cuda(plan()))
    assert found is not None
    assert found.tokens == plan().micro_batch_size * LENGTH
    assert found.documents == micro_batch(plan().recipe, plan().micro_batch_size).documents
    wanted = round(0.15 * LENGTH)
    filled = found.fill(unpad(rows(SHORT, labels=1)), ROWS, LENGTH)
    assert len(filled["labels"]) == len(filled["label_positions"]) == wanted * ROWS


def test_rows_of_a_model_that_no_recipe_describes_are_not_filled() -> None:
    given = on_cuda(plan())
    values = {field.name: getattr(given, field.name) for field in dataclasses.fields(given)}
    assert static_shapes(given) is not None
    assert static_shapes(ModulePlan(**values)) is None
