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
class PairScore:
    """The mean loss of the next-sentence task over pairs, in nats, and how many of them were told right."""

    loss: float
    accuracy: float

    def row(self) -> dict[str, Any]:
        """Return the task's part of a metrics row."""
        return {"eval_nsp_loss": self.loss, "eval_nsp_accuracy": self.accuracy}


@dataclass(frozen=True)
class Evaluation:
    """Means over the labelled tokens of the validation rows, in nats.

    `unigram_loss` is the cross-entropy of the same labels under the token frequencies of the training data (add-one
    smoothed): a model above it has not learned more than frequencies. `pairs` is what the next-sentence task gives.
    """

    loss: float
    accuracy: float
    unigram_loss: float
    labels: int
    pairs: PairScore | None = None

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
            **({} if self.pairs is None else self.pairs.row()),
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
        whole_word_masking=recipe.train.whole_word_masking,
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
    loss, unigram, correct, labels, of_pairs = 0.0, 0.0, 0, 0, [*NO_PAIRS]
    for batch in rows:
        beat()
        flat = batches.unpad(batch)
        counted = flat["labels"][flat["labels"] != batches.IGNORED_LABEL]
        unigram += float(surprisal[counted.numpy()].sum())
        with torch.no_grad():
            loss_sum, right, count, *pairs = model.evaluate(**batches.move(flat, device))
        loss, correct, labels = loss + float(loss_sum), correct + int(right), labels + int(count)
        of_pairs = [held + float(found) for held, found in zip(of_pairs, pairs or NO_PAIRS, strict=True)]
    model.train(training)
    loss, unigram, *counts = world.sum([loss / copies, unigram / copies, correct, labels, *of_pairs])
    correct, labels = (int(count) // copies for count in counts[:2])
    if not labels:
        raise DataError("the validation split has no label that counts; raise data.validation_fraction")
    nsp_loss, told, pair_count = counts[2:]
    score = PairScore(nsp_loss / pair_count, told / pair_count) if pair_count else None
    return Evaluation(loss / labels, correct / labels, unigram / labels, labels, score)


def describe(found: Evaluation, step: int, *, masked: bool) -> str:
    """Return an evaluation as a line for people."""
    accuracy = f"accuracy {found.accuracy:.1%}, " if masked else ""
    gain = found.unigram_loss - found.loss
    pairs = "" if found.pairs is None else f", pairs told right {found.pairs.accuracy:.1%}"
    return (
        f"evaluation at step {step}: loss {found.loss:.4f}, {abs(gain):.2f} nat "
        f"{'better' if gain >= 0 else 'worse'} than token frequencies alone ({found.unigram_loss:.4f}), "
        f"{accuracy}perplexity {found.perplexity:.1f}{pairs}"
    )


NO_PAIRS = (0.0, 0.0, 0.0)
"""Of pairs: the sum of their losses, how many were told right, how many there are."""


def unigram_surprisal(corpus: Corpus) -> NDArray[np.float64]:
    """Return -log of each token's add-one smoothed frequency in the training data."""
    counts = np.asarray(corpus.unigram_counts, dtype=np.float64) + 1
    surprisal: NDArray[np.float64] = -np.log(counts / counts.sum())
    return surprisal
