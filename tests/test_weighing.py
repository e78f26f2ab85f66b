"""Weights of micro-batches: each loss by the share of what it counts, whatever the cut."""

from __future__ import annotations

from typing import Any

import pytest
import torch

from bigtrain.batch import PairLosses
from bigtrain.errors import DataError
from bigtrain.weighing import Weighing
from bigtrain.world import ALONE

LABELS = torch.tensor([[1, 2, 3, -100], [-100] * 4, [4, -100, -100, -100], [-100] * 4])
PAIRS = torch.tensor([[0, 1], [1, -100], [0, -100], [-100, -100]])


def rows(*, pairs: bool) -> dict[str, torch.Tensor]:
    lengths = torch.full((4, 2), 2)
    found = {"input_ids": LABELS.clamp(min=0), "labels": LABELS, "document_lengths": lengths}
    return {**found, "next_sentence_labels": PAIRS} if pairs else found


def weighing() -> Weighing:
    return Weighing(torch.device("cpu"), ALONE, shifted_labels=False)


def mean(values: torch.Tensor) -> torch.Tensor:
    counted = values[values != -100]
    return counted.double().mean() if len(counted) else torch.zeros((), dtype=torch.float64)


def losses_of(batch: Any) -> Any:
    """Return as losses the means of the labels."""
    if "next_sentence_labels" not in batch:
        return mean(batch["labels"])
    return PairLosses(mean(batch["labels"]), mean(batch["next_sentence_labels"]))


@pytest.mark.parametrize("micro", [1, 2, 3, 4])
@pytest.mark.parametrize("pairs", [False, True])
def test_the_cut_does_not_change_the_loss(micro: int, pairs: bool) -> None:
    weighs = weighing()
    parts = [float(weighs.weighted(losses_of(batch))) for batch, _ in weighs.cut(rows(pairs=pairs), micro)]
    expected = 10 / 4 + (2 / 4 if pairs else 0)
    assert sum(parts) == pytest.approx(expected)
    assert float(weighs.loss) == pytest.approx(expected)
    found = {name: float(part) for name, part in weighs.parts.items()}
    assert found == ({"mlm_loss": pytest.approx(2.5), "nsp_loss": pytest.approx(0.5)} if pairs else {})
    weighs.restart()
    assert not weighs.loss and not weighs.parts


def test_rows_that_count_in_no_loss_are_left_out() -> None:
    assert [(len(batch["labels"]), last) for batch, last in weighing().cut(rows(pairs=False), 1)] == [
        (1, False),
        (1, True),
    ]
    assert [last for _, last in weighing().cut(rows(pairs=True), 1)] == [False, False, True]


def test_a_batch_without_any_label_is_refused() -> None:
    empty = {**rows(pairs=False), "labels": torch.full_like(LABELS, -100)}
    with pytest.raises(DataError, match="a batch has no label that counts"):
        next(weighing().cut(empty, 2))


def test_an_output_with_a_loss_is_taken_as_one() -> None:
    class Output:
        loss = torch.tensor(3.0)

    weighs = weighing()
    batch, _ = next(weighs.cut(rows(pairs=False), 1))
    assert len(batch["labels"]) == 1
    assert float(weighs.weighted(Output())) == pytest.approx(3 * 3 / 4)
