"""The parts that all families are made of: weights that initialise themselves, attention, MLP, block.

N tokens of the flat row, W width, H query heads, K key and value heads, G = H + 2K, D numbers per head, I width inside
the MLP, V vocabulary, padded.
"""

from __future__ import annotations

from typing import Any, TypeAlias

import torch
from torch import Tensor, nn

from bigtrain.config.model import ModelConfig
from bigtrain.models.activated import Source, activated, normalized, product
from bigtrain.models.attention import Documents, attend
from bigtrain.models.lookup import Lookup
from bigtrain.models.pointwise import GELU, RMSNorm, SwiGLU

Rotary: TypeAlias = "tuple[Tensor, Tensor]"
"""Cosines and sines (N, 1, D/2) of the rotary angles, fp32."""


@torch.no_grad()
def draw(weight: Tensor, std: float) -> None:
    """Fill a tensor from a normal distribution; for a meta tensor, of no numbers, torch would load its compiler."""
    if not weight.is_meta:
        weight.normal_(std=std)


class Linear(nn.Linear):
    """A linear layer that starts from a normal distribution with a given standard deviation, its bias from zero."""

    def __init__(self, in_features: int, out_features: int, *, bias: bool, std: float) -> None:
        self.std = std
        super().__init__(in_features, out_features, bias=bias)

    def reset_parameters(self) -> None:
        """Draw the weights anew."""
        draw(self.weight, self.std)
        if self.bias is not None:
            nn.init.zeros_(self.bias)


class Table(nn.Module):
    """A matrix with a row for each token, position or segment; `padding` further rows are zero and stay so."""

    def __init__(self, rows: int, width: int, *, std: float, padding: int = 0) -> None:
        super().__init__()
        self.rows, self.std = rows, std
        self.weight = nn.Parameter(torch.empty(rows + padding, width))
        self.reset_parameters()

    def reset_parameters(self) -> None:
        """Draw the rows anew."""
        with torch.no_grad():
            draw(self.weight[: self.rows], self.std)
            self.weight[self.rows :].zero_()

    def forward(self, index_N: Tensor, lookup: Lookup | None = None) -> Tensor:
        """Look up one row for each index: (N,) to (N, W); `lookup` is of a matrix that the head uses too."""
        return (lookup or Lookup())(index_N, self.weight)


class Attention(nn.Module):
    """Multi-head attention with one matrix for queries, keys and values, in that order of rows."""

    def __init__(self, config: ModelConfig, *, dropout: float, output_std: float) -> None:
        super().__init__()
        self.heads = (config.num_attention_heads, config.num_key_value_heads)
        self.head_dim, self.causal, self.dropout = config.head_dim, config.causal, dropout
        width, bias = config.hidden_size, config.family != "llama"
        rows = (self.heads[0] + 2 * self.heads[1]) * self.head_dim
        self.qkv = Linear(width, rows, bias=bias, std=config.initializer_range)
        self.out = Linear(width, width, bias=bias, std=output_std)

    def share(self, ranks: int) -> None:
        """Count the heads that this rank has of those that so many share."""
        self.heads = (self.heads[0] // ranks, self.heads[1] // ranks)

    def forward(
        self, x_NW: Tensor, documents: Documents, rotary: Rotary | None = None, source: Source | None = None
    ) -> Tensor:
        """Mix the tokens of each document: (N, W) to (N, W). `source` is what x was made of."""
        H, K = self.heads
        qkv_NGD = product(self.qkv, x_NW, source).view(-1, H + 2 * K, self.head_dim)
        if rotary is not None:
            qkv_NGD = rotate(qkv_NGD, rotary, H + K)
        dropout = self.dropout if self.training else 0.0
        out_NHD = attend(qkv_NGD, self.heads, documents, causal=self.causal, dropout=dropout)
        out_NW: Tensor = self.out(out_NHD.flatten(1))
        return out_NW


class MLP(nn.Module):
    """Two matrices with a GELU between them: exact for BERT, the tanh form for GPT-2."""

    def __init__(self, config: ModelConfig, *, output_std: float) -> None:
        super().__init__()
        self.activation = GELU("none" if config.family == "bert" else "tanh")
        self.up = Linear(config.hidden_size, config.intermediate_size, bias=True, std=config.initializer_range)
        self.down = Linear(config.intermediate_size, config.hidden_size, bias=True, std=output_std)

    def forward(self, x_NW: Tensor, source: Source | None = None) -> Tensor:
        """Transform each token: (N, W) to (N, W). `source` is what x was made of."""
        return activated(self.activation, product(self.up, x_NW, source), self.down)


class GatedMLP(nn.Module):
    """SwiGLU (Shazeer 2020, arXiv 2002.05202), with one matrix for gate and value, in that order of rows."""

    def __init__(self, config: ModelConfig, *, output_std: float) -> None:
        super().__init__()
        std = config.initializer_range
        self.gate_up = Linear(config.hidden_size, 2 * config.intermediate_size, bias=False, std=std)
        self.down = Linear(config.intermediate_size, config.hidden_size, bias=False, std=output_std)

    def forward(self, x_NW: Tensor, source: Source | None = None) -> Tensor:
        """Transform each token: (N, W) to (N, W). `source` is what x was made of."""
        return activated(SwiGLU(), product(self.gate_up, x_NW, source), self.down)


class Block(nn.Module):
    """Attention and MLP around a residual stream: norms after each sum for BERT, before each part otherwise."""

    def __init__(self, config: ModelConfig, *, dropout: float, attention_dropout: float) -> None:
        super().__init__()
        self.post_norm = config.family == "bert"
        output_std = residual_std(config)
        self.attention = Attention(config, dropout=attention_dropout, output_std=output_std)
        self.attention_norm = norm(config)
        self.mlp = (GatedMLP if config.family == "llama" else MLP)(config, output_std=output_std)
        self.mlp_norm = norm(config)
        self.dropout = Dropout(dropout)

    def forward(self, x_NW: Tensor, documents: Documents, rotary: Rotary | None = None) -> Tensor:
        """Run the block on the flat row: (N, W) to (N, W)."""
        if self.post_norm:
            x_NW, source = normalized(self.attention_norm, x_NW + self.dropout(self.attention(x_NW, documents, rotary)))
            x_NW = self.mlp_norm(x_NW + self.dropout(self.mlp(x_NW, source)))
        else:
            normed_NW, source = normalized(self.attention_norm, x_NW)
            x_NW = x_NW + self.dropout(self.attention(normed_NW, documents, rotary, source))
            normed_NW, source = normalized(self.mlp_norm, x_NW)
            x_NW = x_NW + self.dropout(self.mlp(normed_NW, source))
        return x_NW


def norm(config: ModelConfig) -> nn.Module:
    """Make the family's normalization: RMSNorm for Llama, else LayerNorm."""
    kind = RMSNorm if config.family == "llama" else nn.LayerNorm
    return kind(config.hidden_size, eps=config.norm_eps)


def residual_std(config: ModelConfig) -> float:
    """Return the initial spread of what is added to the residual stream.

    GPT-2 divides it by the root of the number of additions (Radford et al. 2019, section 2.3).
    """
    scale = (2 * config.num_hidden_layers) ** -0.5 if config.family == "gpt" else 1.0
    return config.initializer_range * scale


def rotary_table(position_ids_N: Tensor, head_dim: int, theta: float) -> Rotary:
    """Return cosines and sines of position x theta^(-2i/D) (Su et al. 2021, arXiv 2104.09864), each (N, 1, D/2)."""
    exponents = torch.arange(0, head_dim, 2, device=position_ids_N.device, dtype=torch.float32) / head_dim
    angles_ND = position_ids_N.float()[:, None] * (1.0 / theta**exponents)
    return angles_ND.cos()[:, None], angles_ND.sin()[:, None]


def rotate(x_NGD: Tensor, rotary: Rotary, heads: int) -> Tensor:
    """Turn number i of each of the first heads against number i + D/2, computed in fp32; (N, G, D) to the same.

    What comes is not kept for the backward pass, which turns gradients back.
    """
    turned_NGD: Tensor = _Rotate.apply(x_NGD, *rotary, heads)  # type: ignore[no-untyped-call]
    return turned_NGD


class _Rotate(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, x_NGD: Tensor, cos: Tensor, sin: Tensor, heads: int) -> Tensor:
        ctx.save_for_backward(cos, sin)
        ctx.heads = heads
        return _rotated(x_NGD, cos, sin, heads)

    @staticmethod
    def backward(ctx: Any, grad_NGD: Tensor) -> tuple[Tensor, None, None, None]:
        cos, sin = ctx.saved_tensors
        return _rotated(grad_NGD, cos, -sin, ctx.heads), None, None, None


def _rotated(x_NGD: Tensor, cos: Tensor, sin: Tensor, heads: int) -> Tensor:
    out_NGD = torch.empty_like(x_NGD)
    first, second = x_NGD[:, :heads].chunk(2, dim=-1)
    out_first, out_second = out_NGD[:, :heads].chunk(2, dim=-1)
    out_first.copy_((first * cos).sub_(second * sin))
    out_second.copy_((second * cos).add_(first * sin))
    out_NGD[:, heads:].copy_(x_NGD[:, heads:])
    return out_NGD


class Dropout(nn.Dropout):
    """Dropout that keeps one byte a number for the backward pass, on every device."""

    def forward(self, x: Tensor) -> Tensor:
        """Zero a share of the numbers and scale the rest, in training; any shape."""
        return torch.native_dropout(x, self.p, True)[0] if self.training and self.p else x
