"""GPT-2 and BERT by hand, as short as they get; tensors have bigtrain's names, so that all start from the same."""

from __future__ import annotations

from dataclasses import dataclass

import torch
import torch.nn.functional as F
from torch import Tensor, nn


@dataclass(frozen=True)
class Shape:
    """What the model looks like; `bert` or GPT-2."""

    bert: bool
    width: int
    blocks: int
    heads: int
    inner: int
    vocabulary: int
    positions: int
    eps: float
    dropout: float


class Attention(nn.Module):
    """Self-attention of whole rows, (B, T, W)."""

    def __init__(self, shape: Shape) -> None:
        super().__init__()
        self.heads, self.causal = shape.heads, not shape.bert
        self.qkv, self.out = nn.Linear(shape.width, 3 * shape.width), nn.Linear(shape.width, shape.width)

    def forward(self, x: Tensor) -> Tensor:
        q, k, v = self.qkv(x).unflatten(-1, (3, self.heads, -1)).permute(2, 0, 3, 1, 4)
        mixed = F.scaled_dot_product_attention(q, k, v, is_causal=self.causal)
        return self.out(mixed.transpose(1, 2).flatten(2))  # type: ignore[no-any-return]


class MLP(nn.Module):
    def __init__(self, shape: Shape) -> None:
        super().__init__()
        self.up, self.down = nn.Linear(shape.width, shape.inner), nn.Linear(shape.inner, shape.width)
        self.form = "none" if shape.bert else "tanh"

    def forward(self, x: Tensor) -> Tensor:
        return self.down(F.gelu(self.up(x), approximate=self.form))  # type: ignore[no-any-return]


class Block(nn.Module):
    def __init__(self, shape: Shape) -> None:
        super().__init__()
        self.bert, self.dropout = shape.bert, nn.Dropout(shape.dropout)
        self.attention, self.mlp = Attention(shape), MLP(shape)
        self.attention_norm = nn.LayerNorm(shape.width, eps=shape.eps)
        self.mlp_norm = nn.LayerNorm(shape.width, eps=shape.eps)

    def forward(self, x: Tensor) -> Tensor:
        if self.bert:
            x = self.attention_norm(x + self.dropout(self.attention(x)))
            return self.mlp_norm(x + self.dropout(self.mlp(x)))  # type: ignore[no-any-return]
        x = x + self.dropout(self.attention(self.attention_norm(x)))
        return x + self.dropout(self.mlp(self.mlp_norm(x)))  # type: ignore[no-any-return]


class Trunk(nn.Module):
    def __init__(self, shape: Shape) -> None:
        super().__init__()
        self.tokens = nn.Embedding(shape.vocabulary, shape.width)
        self.positions = nn.Embedding(shape.positions, shape.width)
        self.dropout = nn.Dropout(shape.dropout)
        self.blocks = nn.ModuleList(Block(shape) for _ in range(shape.blocks))

    def embedded(self, ids: Tensor) -> Tensor:
        return self.tokens(ids) + self.positions.weight[: ids.shape[1]]  # type: ignore[no-any-return]


class GPT(Trunk):
    """Predicts the next token."""

    def __init__(self, shape: Shape) -> None:
        super().__init__(shape)
        self.final_norm = nn.LayerNorm(shape.width, eps=shape.eps)

    def forward(self, ids: Tensor, labels: Tensor) -> Tensor:
        """Return the mean loss; `labels` are the tokens that follow."""
        x = self.dropout(self.embedded(ids))
        for block in self.blocks:
            x = block(x)
        return F.cross_entropy(F.linear(self.final_norm(x), self.tokens.weight).flatten(0, 1).float(), labels.flatten())


class Bert(Trunk):
    """Predicts masked tokens."""

    def __init__(self, shape: Shape) -> None:
        super().__init__(shape)
        self.segments = nn.Embedding(2, shape.width)
        self.embedding_norm = nn.LayerNorm(shape.width, eps=shape.eps)
        self.head_dense = nn.Linear(shape.width, shape.width)
        self.head_norm = nn.LayerNorm(shape.width, eps=shape.eps)
        self.decoder_bias = nn.Parameter(torch.zeros(shape.vocabulary))

    def forward(self, ids: Tensor, labels: Tensor, places: Tensor) -> Tensor:
        """Return the mean loss over `labels`, (M,), at these places of the flattened rows."""
        x = self.dropout(self.embedding_norm(self.embedded(ids) + self.segments.weight[0]))
        for block in self.blocks:
            x = block(x)
        x = self.head_norm(F.gelu(self.head_dense(x.flatten(0, 1)[places])))
        return F.cross_entropy(F.linear(x, self.tokens.weight, self.decoder_bias).float(), labels)


def make(shape: Shape) -> nn.Module:
    """Return a model that starts from normal weights; an arm with shared ones writes them over."""
    model: nn.Module = Bert(shape) if shape.bert else GPT(shape)
    for module in model.modules():
        if isinstance(module, nn.Linear | nn.Embedding):
            nn.init.normal_(module.weight, std=0.02)
    return model
