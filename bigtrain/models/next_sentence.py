"""BERT's second task (Devlin et al. 2018, arXiv 1810.04805, section 3.1): does the second text follow the first?

N tokens of the flat row, K pairs of texts, each a document of the row that begins with [CLS], W width.
"""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from bigtrain.batch import IGNORED_LABEL
from bigtrain.config.model import ModelConfig
from bigtrain.models.layers import Linear
from bigtrain.models.shape import NEXT_SENTENCE_CLASSES


class NextSentence(nn.Module):
    """The pooler, a dense layer and tanh on each document's first token, and two logits: it follows, it does not."""

    def __init__(self, config: ModelConfig) -> None:
        super().__init__()
        width, std = config.hidden_size, config.initializer_range
        self.pooler = Linear(width, width, bias=True, std=std)
        self.head = Linear(width, NEXT_SENTENCE_CLASSES, bias=True, std=std)

    def forward(self, hidden_NW: Tensor, cu_seqlens: Tensor) -> Tensor:
        """Return the logits of each document, (K, 2), from the hidden states of all tokens; of empty ones any."""
        first_K = cu_seqlens[:-1].long().clamp(max=len(hidden_NW) - 1)  # empty ones at the end begin where it ends
        pooled_KW = self.pooler(hidden_NW[first_K]).tanh()
        logits_K2: Tensor = self.head(pooled_KW)
        return logits_K2


def next_sentence_loss(logits_K2: Tensor, labels_K: Tensor) -> Tensor:
    """Return the mean cross-entropy of the labels, fp32 (fp64 stays); 0, and its gradients too, where none counts."""
    logits_K2 = logits_K2 if logits_K2.dtype == torch.float64 else logits_K2.float()
    total = F.cross_entropy(logits_K2, labels_K, ignore_index=IGNORED_LABEL, reduction="sum")
    return total / (labels_K != IGNORED_LABEL).sum().clamp(min=1)


@torch.no_grad()
def next_sentence_score(logits_K2: Tensor, labels_K: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    """Return the sum of the cross-entropy, how many labels have the highest logit, and how many labels there are."""
    count = (labels_K != IGNORED_LABEL).sum()
    correct = (logits_K2.argmax(1) == labels_K).sum()
    return next_sentence_loss(logits_K2, labels_K) * count, correct, count
