"""The loss on documents that were kept from training, beside what knowing word frequencies alone would give."""

from __future__ import annotations

import math
from collections.abc import Iterable
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray
from torch import nn

from bigtrain import batch as batches
from bigtrain.batch import Batch
from bigtrain.data.corpus import Corpus
from bigtrain.data.loader import evaluation_batches
from bigtrain.errors import DataError
from bigtrain.heartbeat import beat
from bigtrain.planner.plan import Plan
from bigtrain.world import ALONE, World, current_world


@dataclass(frozen=True)
class Evaluation:
    """Means over the labelled tokens of the validation rows, in nats.

    `unigram_loss` is the cross-entropy of the same labels under the token frequencies of the training data (add-one
    smoothed): a model above it has not learned more than frequencies.
    """

    loss: float
    accuracy: float
    unigram_loss: float
    labels: int

    @property
    def perplexity(self) -> float:
        return math.exp(min(self.loss, 700.0))

    def row(self) -> dict[str, Any]:
        """Return the evaluation's part of a metrics row."""
        return {
            "eval_loss": self.loss,
            "eval_accuracy": self.accuracy,
            "eval_perplexity": self.perplexity,
            "eval_unigram_loss": self.unigram_loss,
            "eval_labels": self.labels,
        }


def evaluate_plan(model: nn.Module, plan: Plan, corpus: Corpus, device: torch.device) -> Evaluation:
    """Evaluate a bigtrain model on a corpus's validation split, as a plan's recipe says; each rank takes its share."""
    recipe, world = plan.recipe, current_world()
    rank, ranks = world.reading(recipe.sharding.tensor_parallel)
    rows = evaluation_batches(
        corpus,
        objective=recipe.train.objective,
        sequence_length=recipe.data.sequence_length,
        packing=recipe.data.packing,
        masking_probability=recipe.train.masking_probability,
        micro_batch_size=plan.micro_batch_size,
        rows_limit=recipe.train.eval_rows,
        rank=rank,
        world_size=ranks,
    )
    return evaluate(model, rows, unigram_surprisal(corpus), device, world, copies=world.size // ranks)


def evaluate(
    model: Any,
    rows: Iterable[Batch],
    surprisal: NDArray[np.float64],
    device: torch.device,
    world: World = ALONE,
    *,
    copies: int = 1,
) -> Evaluation:
    """Evaluate on packed rows; `surprisal` (vocabulary,) is what each label costs under token frequencies, in nats.

    The result is that of all ranks' rows, of which each has equally many batches; `copies` ranks have the same ones.
    """
    training = model.training
    model.eval()
    loss, unigram, correct, labels = 0.0, 0.0, 0, 0
    for batch in rows:
        beat()
        flat = batches.unpad(batch)
        counted = flat["labels"][flat["labels"] != batches.IGNORED_LABEL]
        unigram += float(surprisal[counted.numpy()].sum())
        with torch.no_grad():
            loss_sum, right, count = model.evaluate(**batches.move(flat, device))
        loss, correct, labels = loss + float(loss_sum), correct + int(right), labels + int(count)
    model.train(training)
    loss, unigram, *counts = world.sum([loss / copies, unigram / copies, correct, labels])
    correct, labels = (int(count) // copies for count in counts)
    if not labels:
        raise DataError("the validation split has no label that counts; raise data.validation_fraction")
    return Evaluation(loss / labels, correct / labels, unigram / labels, labels)


def unigram_surprisal(corpus: Corpus) -> NDArray[np.float64]:
    """Return -log of each token's add-one smoothed frequency in the training data."""
    counts = np.asarray(corpus.unigram_counts, dtype=np.float64) + 1
    surprisal: NDArray[np.float64] = -np.log(counts / counts.sum())
    return surprisal
