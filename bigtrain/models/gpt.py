"""Decoders: GPT-2 (Radford et al. 2019) and Llama-style (Touvron et al. 2023, arXiv 2307.09288).

N tokens of the flat row, W width.
"""

from __future__ import annotations

from torch import Tensor, nn

from bigtrain.config.model import ModelConfig
from bigtrain.models.language_model import LanguageModel, own_decoder, vocabulary_table
from bigtrain.models.layers import Block, Dropout, Rotary, Table, norm, rotary_table
from bigtrain.models.lookup import Lookup


class Decoder(LanguageModel):
    """Pre-norm blocks that see backwards only; positions are learned (gpt) or rotary (llama)."""

    def __init__(
        self, config: ModelConfig, *, dropout: float, attention_dropout: float, z_loss: float, label_smoothing: float
    ) -> None:
        super().__init__(config, z_loss=z_loss, label_smoothing=label_smoothing)
        self.tokens = vocabulary_table(config)
        self.positions = None
        if config.family == "gpt":
            positions, std = config.max_position_embeddings, config.initializer_range
            self.positions = Table(positions, config.hidden_size, std=std)
        self.dropout = Dropout(dropout)
        self.blocks = nn.ModuleList(
            Block(config, dropout=dropout, attention_dropout=attention_dropout) for _ in range(config.num_hidden_layers)
        )
        self.final_norm = norm(config)
        self.decoder = own_decoder(config)

    def embed(
        self,
        input_ids: Tensor,
        position_ids: Tensor,
        lookup: Lookup | None = None,
        segment_ids: Tensor | None = None,
    ) -> Tensor:
        """Return the token's embedding, with its position's where those are learned. Raises ValueError for segments."""
        if segment_ids is not None:
            raise ValueError("segment_ids: decoders know no segments")
        x_NW: Tensor = self.tokens(input_ids, lookup)
        if self.positions is not None:
            x_NW = x_NW + self.positions(position_ids)
        out_NW: Tensor = self.dropout(x_NW)
        return out_NW

    def rotary(self, position_ids: Tensor) -> Rotary | None:
        """Return the rotary angles of the positions (llama)."""
        if self.positions is not None:
            return None
        return rotary_table(position_ids, self.config.head_dim, self.config.rope_theta)

    def finish(self, x_NW: Tensor) -> Tensor:
        """Normalize what the last block leaves."""
        out_NW: Tensor = self.final_norm(x_NW)
        return out_NW
