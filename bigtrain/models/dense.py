"""The same weights on padded batches, in plain operations, with attention as the caller computes it.

For what reads rows side by side: generation, whose keys and values are kept, and programs for deployment.

B rows, L tokens in each, W width, H query heads, K key and value heads, G = H + 2K, D numbers per head, V vocabulary.
"""

from __future__ import annotations

from collections.abc import Callable
from functools import partial
from typing import Any, TypeAlias

import torch
import torch.nn.functional as F
from torch import Tensor

from bigtrain.models.bert import Bert
from bigtrain.models.language_model import LanguageModel
from bigtrain.models.layers import rotary_table

Attend: TypeAlias = Callable[[int, Tensor, Tensor, Tensor], Tensor]
"""From a block's number, queries (B, H, L, D), keys and values (B, K, L, D) to what each query finds, (B, H, L, D)."""

Turns: TypeAlias = "tuple[Tensor, Tensor]"
"""Cosines and sines (B, 1, L, D/2) of the rotary angles, fp32."""


def dense_hidden(model: LanguageModel, input_ids_BL: Tensor, position_ids_BL: Tensor, attend: Attend) -> Tensor:
    """Return the hidden state of each token before the head, (B, L, W), without dropout."""
    turns = _turns(model, position_ids_BL)
    x_BLW = _embedded(model, input_ids_BL, position_ids_BL)
    for number, block in enumerate(model.blocks):
        x_BLW = _through(block, x_BLW, turns, partial(attend, number))
    return model.finish(x_BLW)


def dense_logits(model: LanguageModel, hidden_BLW: Tensor) -> Tensor:
    """Return the logits of hidden states, (B, L, W) to (B, L, V), over the vocabulary without its padding."""
    weight_VW, bias_V = model.decoder_weights()
    size = model.config.vocab_size
    return F.linear(model.head(hidden_BLW), weight_VW[:size], None if bias_V is None else bias_V[:size])


def shared_heads(x_BKLD: Tensor, heads: int) -> Tensor:
    """Return keys or values once for each of the query heads that share them: (B, K, L, D) to (B, H, L, D)."""
    each = heads // x_BKLD.shape[1]
    return x_BKLD if each == 1 else x_BKLD.repeat_interleave(each, dim=1)


def _embedded(model: Any, input_ids_BL: Tensor, position_ids_BL: Tensor) -> Tensor:
    x_BLW = F.embedding(input_ids_BL, model.tokens.weight)
    if model.positions is not None:
        x_BLW = x_BLW + F.embedding(position_ids_BL, model.positions.weight)
    if isinstance(model, Bert):
        normalized_BLW: Tensor = model.embedding_norm(x_BLW + model.segments.weight[0])
        return normalized_BLW
    return x_BLW


def _through(block: Any, x_BLW: Tensor, turns: Turns | None, attend: Callable[..., Tensor]) -> Tensor:
    """Run one block: norms after each sum for BERT, before each part otherwise."""
    if block.post_norm:
        x_BLW = block.attention_norm(x_BLW + _attention(block.attention, x_BLW, turns, attend))
        normalized_BLW: Tensor = block.mlp_norm(x_BLW + block.mlp(x_BLW))
        return normalized_BLW
    x_BLW = x_BLW + _attention(block.attention, block.attention_norm(x_BLW), turns, attend)
    summed_BLW: Tensor = x_BLW + block.mlp(block.mlp_norm(x_BLW))
    return summed_BLW


def _attention(attention: Any, x_BLW: Tensor, turns: Turns | None, attend: Callable[..., Tensor]) -> Tensor:
    H, K = attention.heads
    qkv_BGLD = attention.qkv(x_BLW).unflatten(-1, (H + 2 * K, attention.head_dim)).transpose(1, 2)
    q_BHLD, k_BKLD, v_BKLD = qkv_BGLD.split_with_sizes([H, K, K], dim=1)
    if turns is not None:
        q_BHLD, k_BKLD = _turned(q_BHLD, turns), _turned(k_BKLD, turns)
    out_BLW: Tensor = attention.out(attend(q_BHLD, k_BKLD, v_BKLD).transpose(1, 2).flatten(2))
    return out_BLW


def _turns(model: LanguageModel, position_ids_BL: Tensor) -> Turns | None:
    if model.config.family != "llama":
        return None
    angles = rotary_table(position_ids_BL.flatten(), model.config.head_dim, model.config.rope_theta)
    cos, sin = (torch.unflatten(part, 0, position_ids_BL.shape).transpose(1, 2) for part in angles)
    return cos, sin


def _turned(x_BGLD: Tensor, turns: Turns) -> Tensor:
    cos, sin = turns
    first, second = x_BGLD.chunk(2, dim=-1)
    return torch.cat((first * cos - second * sin, second * cos + first * sin), dim=-1).to(x_BGLD.dtype)
