"""BERT (Devlin et al. 2018, arXiv 1810.04805): post-norm blocks that see both ways, and the masked-token head.

N tokens of the flat row, M labelled positions, K documents or pairs, W width, V vocabulary, padded.
"""

from __future__ import annotations

from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from bigtrain.batch import PairLosses
from bigtrain.config.model import ModelConfig
from bigtrain.models.language_model import LanguageModel, own_decoder, vocabulary_table
from bigtrain.models.layers import Block, Dropout, Linear, Table, norm
from bigtrain.models.lookup import Lookup
from bigtrain.models.next_sentence import NextSentence, next_sentence_loss, next_sentence_score
from bigtrain.models.shape import SEGMENTS


class Bert(LanguageModel):
    """Token, position and segment embeddings, the blocks, and a dense layer before the vocabulary's matrix."""

    def __init__(
        self, config: ModelConfig, *, dropout: float, attention_dropout: float, z_loss: float, label_smoothing: float
    ) -> None:
        super().__init__(config, z_loss=z_loss, label_smoothing=label_smoothing)
        width, std = config.hidden_size, config.initializer_range
        self.tokens = vocabulary_table(config)
        self.positions = Table(config.max_position_embeddings, width, std=std)
        self.segments = Table(SEGMENTS, width, std=std)
        self.embedding_norm = norm(config)
        self.dropout = Dropout(dropout)
        self.blocks = nn.ModuleList(
            Block(config, dropout=dropout, attention_dropout=attention_dropout) for _ in range(config.num_hidden_layers)
        )
        self.head_dense = Linear(width, width, bias=True, std=std)
        self.head_norm = norm(config)
        self.decoder = own_decoder(config)
        self.decoder_bias = nn.Parameter(torch.empty(config.padded_vocab_size))
        self.next_sentence = NextSentence(config) if config.next_sentence else None
        self.reset_parameters()

    def reset_parameters(self) -> None:
        """Zero the bias of the vocabulary's matrix, the one parameter that no other module holds."""
        nn.init.zeros_(self.decoder_bias)

    def embed(
        self,
        input_ids: Tensor,
        position_ids: Tensor,
        lookup: Lookup | None = None,
        segment_ids: Tensor | None = None,
    ) -> Tensor:
        """Return the normalized sum of the embeddings; without `segment_ids` every token is in segment 0."""
        x_NW = self.tokens(input_ids, lookup) + self.positions(position_ids)
        if segment_ids is None:
            x_NW = x_NW + self.segments.weight[0].to(x_NW.dtype)
        else:
            x_NW = x_NW + self.segments(segment_ids)
        out_NW: Tensor = self.dropout(self.embedding_norm(x_NW))
        return out_NW

    def forward(
        self,
        input_ids: Tensor,
        position_ids: Tensor,
        cu_seqlens: Tensor,
        labels: Tensor | None = None,
        label_positions: Tensor | None = None,
        max_seqlen: int | None = None,
        segment_ids: Tensor | None = None,
        next_sentence_labels: Tensor | None = None,
    ) -> Any:
        """Return the mean loss over the labels, or with labels of pairs (K,) both mean losses, `PairLosses`.

        All else as of `LanguageModel`. A document is a pair; its label is 0 where the second text follows, 1 if not.
        """
        if labels is None or next_sentence_labels is None:
            where = (input_ids, position_ids, cu_seqlens, labels, label_positions, max_seqlen, segment_ids)
            return super().forward(*where)
        lookup = Lookup() if self.decoder is None else None
        hidden_NW = self.hidden(input_ids, position_ids, cu_seqlens, max_seqlen, lookup, segment_ids)
        # First, so that its backward pass comes last: the other one's logits would lie beside its gradient.
        nsp_loss = next_sentence_loss(self._next_sentence(hidden_NW, cu_seqlens), next_sentence_labels)
        return PairLosses(self.token_loss(hidden_NW, labels, label_positions, lookup), nsp_loss)

    def next_sentence_logits(
        self,
        input_ids: Tensor,
        position_ids: Tensor,
        cu_seqlens: Tensor,
        segment_ids: Tensor,
        max_seqlen: int | None = None,
    ) -> Tensor:
        """Return the logits of each pair, (K, 2): the second text follows the first, it does not."""
        hidden_NW = self.hidden(input_ids, position_ids, cu_seqlens, max_seqlen, segment_ids=segment_ids)
        return self._next_sentence(hidden_NW, cu_seqlens)

    @torch.no_grad()
    def evaluate(
        self,
        input_ids: Tensor,
        position_ids: Tensor,
        cu_seqlens: Tensor,
        labels: Tensor,
        label_positions: Tensor | None = None,
        max_seqlen: int | None = None,
        segment_ids: Tensor | None = None,
        next_sentence_labels: Tensor | None = None,
    ) -> tuple[Tensor, ...]:
        """Return what `LanguageModel.evaluate` does, and the same three numbers of the pairs where they have labels."""
        hidden_NW = self.hidden(input_ids, position_ids, cu_seqlens, max_seqlen, segment_ids=segment_ids)
        found = self.token_score(hidden_NW, labels, label_positions)
        if next_sentence_labels is None:
            return found
        return *found, *next_sentence_score(self._next_sentence(hidden_NW, cu_seqlens), next_sentence_labels)

    def _next_sentence(self, hidden_NW: Tensor, cu_seqlens: Tensor) -> Tensor:
        if self.next_sentence is None:
            raise ValueError("the model has no next-sentence head; train it with train.objective=mlm_nsp")
        logits_K2: Tensor = self.next_sentence(hidden_NW, cu_seqlens)
        return logits_K2

    def head(self, hidden_MW: Tensor) -> Tensor:
        """Transform the hidden states of labelled positions."""
        out_MW: Tensor = self.head_norm(F.gelu(self.head_dense(hidden_MW)))
        return out_MW

    def decoder_weights(self) -> tuple[Tensor, Tensor | None]:
        """Return the vocabulary's matrix (V, W) and its bias (V,), both padded."""
        return super().decoder_weights()[0], self.decoder_bias
