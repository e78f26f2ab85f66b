"""What BERT, GPT-2 and Llama share: a flat row of tokens in, the loss at its labelled positions out.

N tokens of the flat row, M labelled positions, W width, V vocabulary.
"""

from __future__ import annotations

from abc import ABC, abstractmethod
from typing import Any

import torch
from torch import Tensor, nn

from bigtrain import products
from bigtrain.config.model import ModelConfig
from bigtrain.models.attention import Documents
from bigtrain.models.layers import Rotary, Table
from bigtrain.models.lookup import Lookup
from bigtrain.models.loss import linear_cross_entropy, score


class LanguageModel(nn.Module, ABC):
    """Embedding, blocks and a head onto the vocabulary.

    `blocks` holds modules of one class, which recompute, compilation and sharding may wrap one by one.
    `cu_seqlens` (K + 1,) int32 are the boundaries of K documents in the flat row, and `max_seqlen` the longest one's
    length; without it, it is read from `cu_seqlens`, which waits for a GPU.
    """

    blocks: nn.ModuleList
    tokens: Table
    decoder: Table | None
    """The head's matrix where the token embedding does not serve as such."""
    loss_chunk_tokens: int | None = None
    """Positions whose logits exist at a time; None is what suits the device."""

    def __init__(self, config: ModelConfig, *, z_loss: float, label_smoothing: float) -> None:
        super().__init__()
        self.config = config
        self.z_loss, self.label_smoothing = z_loss, label_smoothing

    @abstractmethod
    def embed(
        self,
        input_ids: Tensor,
        position_ids: Tensor,
        lookup: Lookup | None = None,
        segment_ids: Tensor | None = None,
    ) -> Tensor:
        """Return what the first block reads, (N,) to (N, W); `lookup` where the head uses the embedding too.

        `segment_ids` tell the first text of a pair from the second, for models that know segments.
        """

    def rotary(self, position_ids: Tensor) -> Rotary | None:
        """Return the rotary angles that every block applies, if the family has them."""
        return None

    def finish(self, x_NW: Tensor) -> Tensor:
        """Return the hidden states, from what the last block leaves: (N, W) to (N, W)."""
        return x_NW

    def head(self, hidden_MW: Tensor) -> Tensor:
        """Prepare hidden states for the product with the vocabulary's matrix: (M, W) to (M, W)."""
        return hidden_MW

    def decoder_weights(self) -> tuple[Tensor, Tensor | None]:
        """Return the vocabulary's matrix (V, W) and its bias (V,), both padded."""
        return (self.tokens if self.decoder is None else self.decoder).weight, None

    def hidden(
        self,
        input_ids: Tensor,
        position_ids: Tensor,
        cu_seqlens: Tensor,
        max_seqlen: int | None = None,
        lookup: Lookup | None = None,
        segment_ids: Tensor | None = None,
    ) -> Tensor:
        """Return the hidden state of each token, before the head: (N, W)."""
        documents, rotary = Documents(cu_seqlens, max_seqlen), self.rotary(position_ids)
        x_NW = self.embed(input_ids, position_ids, lookup, segment_ids)
        for block in self.blocks:
            x_NW = block(x_NW, documents, rotary)
        return self.finish(x_NW)

    def forward(
        self,
        input_ids: Tensor,
        position_ids: Tensor,
        cu_seqlens: Tensor,
        labels: Tensor | None = None,
        label_positions: Tensor | None = None,
        max_seqlen: int | None = None,
        segment_ids: Tensor | None = None,
    ) -> Any:
        """Return the mean loss over the labels, an fp32 scalar; 0, and its gradients too, where none counts.

        `labels` are (M,) at the `label_positions` (M,) of the flat row, or without positions (N,), one for each token,
        of which those of IGNORED_LABEL do not count. Without `labels`, return every token's logits (N, V).
        """
        if labels is None:
            return self.logits(input_ids, position_ids, cu_seqlens, max_seqlen=max_seqlen, segment_ids=segment_ids)
        lookup = Lookup() if self.decoder is None else None
        hidden_NW = self.hidden(input_ids, position_ids, cu_seqlens, max_seqlen, lookup, segment_ids)
        return self.token_loss(hidden_NW, labels, label_positions, lookup)

    def token_loss(
        self, hidden_NW: Tensor, labels: Tensor, label_positions: Tensor | None, lookup: Lookup | None
    ) -> Tensor:
        """Return the mean loss over the labels from the hidden states of all tokens."""
        return linear_cross_entropy(
            self.head(_at(hidden_NW, label_positions)),
            *self.decoder_weights(),
            labels,
            lookup=lookup,
            chunk_tokens=self.loss_chunk_tokens,
            vocab_size=self.config.vocab_size,
            z_loss=self.z_loss,
            label_smoothing=self.label_smoothing,
        )

    def logits(
        self,
        input_ids: Tensor,
        position_ids: Tensor,
        cu_seqlens: Tensor,
        at: Tensor | None = None,
        max_seqlen: int | None = None,
        segment_ids: Tensor | None = None,
    ) -> Tensor:
        """Return the logits of every token, or of the positions `at` (M,), over the vocabulary without its padding."""
        hidden_NW = self.hidden(input_ids, position_ids, cu_seqlens, max_seqlen, segment_ids=segment_ids)
        hidden_MW = self.head(_at(hidden_NW, at))
        weight_VW, bias_V = self.decoder_weights()
        size = self.config.vocab_size
        bias_V = None if bias_V is None else bias_V[:size].to(hidden_MW.dtype)
        return products.linear(hidden_MW, weight_VW[:size].to(hidden_MW.dtype), bias_V)

    @torch.no_grad()
    def evaluate(
        self,
        input_ids: Tensor,
        position_ids: Tensor,
        cu_seqlens: Tensor,
        labels: Tensor,
        label_positions: Tensor | None = None,
        max_seqlen: int | None = None,
    ) -> tuple[Tensor, ...]:
        """Return the sum of the plain cross-entropy, how many labels have the highest logit, and how many there are.

        No smoothing and no z-loss; dropout is as the module's mode says, so call `eval()` first.
        """
        hidden_NW = self.hidden(input_ids, position_ids, cu_seqlens, max_seqlen)
        return self.token_score(hidden_NW, labels, label_positions)

    def token_score(
        self, hidden_NW: Tensor, labels: Tensor, label_positions: Tensor | None
    ) -> tuple[Tensor, Tensor, Tensor]:
        """Return what `evaluate` does, from the hidden states of all tokens."""
        hidden_MW = self.head(_at(hidden_NW, label_positions))
        vocab_size, chunk = self.config.vocab_size, self.loss_chunk_tokens
        return score(hidden_MW, *self.decoder_weights(), labels, vocab_size=vocab_size, chunk_tokens=chunk)


def _at(hidden_NW: Tensor, positions: Tensor | None) -> Tensor:
    return hidden_NW if positions is None else hidden_NW[positions]


def vocabulary_table(config: ModelConfig) -> Table:
    """Make a matrix with a row for each token, and zero rows for the vocabulary's padding."""
    padding = config.padded_vocab_size - config.vocab_size
    return Table(config.vocab_size, config.hidden_size, std=config.initializer_range, padding=padding)


def own_decoder(config: ModelConfig) -> Table | None:
    """Make the head's own matrix, unless it is tied to the token embedding."""
    return None if config.tie_word_embeddings else vocabulary_table(config)
