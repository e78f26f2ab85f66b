"""BERT (Devlin et al. 2018, arXiv 1810.04805): post-norm blocks that see both ways, and the masked-token head.

N tokens of the flat row, M labelled positions, W width, V vocabulary, padded.
"""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from bigtrain.config.model import ModelConfig
from bigtrain.models.language_model import LanguageModel, own_decoder, vocabulary_table
from bigtrain.models.layers import Block, Dropout, Linear, Table, norm
from bigtrain.models.lookup import Lookup
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
        self.reset_parameters()

    def reset_parameters(self) -> None:
        """Zero the bias of the vocabulary's matrix, the one parameter that no other module holds."""
        nn.init.zeros_(self.decoder_bias)

    def embed(self, input_ids: Tensor, position_ids: Tensor, lookup: Lookup | None = None) -> Tensor:
        """Return the normalized sum of the embeddings; every token is in segment 0."""
        x_NW = self.tokens(input_ids, lookup) + self.positions(position_ids)
        x_NW = x_NW + self.segments.weight[0].to(x_NW.dtype)
        out_NW: Tensor = self.dropout(self.embedding_norm(x_NW))
        return out_NW

    def head(self, hidden_MW: Tensor) -> Tensor:
        """Transform the hidden states of labelled positions."""
        out_MW: Tensor = self.head_norm(F.gelu(self.head_dense(hidden_MW)))
        return out_MW

    def decoder_weights(self) -> tuple[Tensor, Tensor | None]:
        """Return the vocabulary's matrix (V, W) and its bias (V,), both padded."""
        return super().decoder_weights()[0], self.decoder_bias
