"""Keys and values of tokens that were read, so that a further token costs one token.

B rows, L tokens read at once, S tokens that there is room for, H query heads, K key and value heads, D numbers
per head.
"""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor

from bigtrain.config.model import ModelConfig
from bigtrain.models.dense import Attend, shared_heads


def cache_bytes(config: ModelConfig, rows: int, tokens: int, bytes_per_number: int = 4) -> int:
    """Return what the keys and values of so many rows of so many tokens take."""
    per_token = 2 * config.num_hidden_layers * config.num_key_value_heads * config.head_dim
    return per_token * rows * tokens * bytes_per_number


class Cache:
    """Room for `tokens` tokens of each of `rows` rows in every block, allocated once.

    Rows begin at place 0, whatever their lengths. What lies beyond a row's end is never seen.
    """

    def __init__(self, config: ModelConfig, rows: int, tokens: int, *, like: Tensor) -> None:
        shape = (config.num_hidden_layers, rows, config.num_key_value_heads, tokens, config.head_dim)
        # Zeros: a number that is none would spread, though it is seen with probability 0.
        self.keys, self.values = like.new_zeros(shape), like.new_zeros(shape)

    @property
    def bytes(self) -> int:
        """Return what it takes."""
        return self.keys.nbytes + self.values.nbytes

    def reading(self) -> Attend:
        """Return attention for rows that are read from their first token: each token sees those before it."""

        def attend(block: int, q_BHLD: Tensor, k_BKLD: Tensor, v_BKLD: Tensor) -> Tensor:
            length = k_BKLD.shape[2]
            self.keys[block, :, :, :length], self.values[block, :, :, :length] = k_BKLD, v_BKLD
            keys, values = (shared_heads(part, q_BHLD.shape[1]) for part in (k_BKLD, v_BKLD))
            return F.scaled_dot_product_attention(q_BHLD, keys, values, is_causal=True)

        return attend

    def adding(self, places_B: Tensor) -> Attend:
        """Return attention for one further token a row, at these places: it sees itself and what lies before."""
        rows = torch.arange(len(places_B), device=places_B.device)
        used = int(places_B.max()) + 1
        seen_B11S = (torch.arange(used, device=places_B.device) <= places_B[:, None])[:, None, None]

        def attend(block: int, q_BH1D: Tensor, k_BK1D: Tensor, v_BK1D: Tensor) -> Tensor:
            self.keys[block][rows, :, places_B] = k_BK1D[:, :, 0]
            self.values[block][rows, :, places_B] = v_BK1D[:, :, 0]
            kept = (self.keys[block, :, :, :used], self.values[block, :, :, :used])
            keys, values = (shared_heads(part, q_BH1D.shape[1]) for part in kept)
            return F.scaled_dot_product_attention(q_BH1D, keys, values, attn_mask=seen_B11S)

        return attend
