"""What torch's flash attention for CPUs holds inside itself. No torch.

B documents of equal length, H query heads, K key and value heads, L queries and S keys in each document, D numbers per
head. Source of all sizes: aten/src/ATen/native/cpu/FlashAttentionKernel.cpp, torch 2.13.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Literal

FLOAT = 4
SPLIT_KEYS = 512
"""Keys that a thread works on at once, at most."""

LEAST_TO_PACK = {"bf16": (64, 4), "fp16": (16, 1)}
"""From how many queries and keys on the kernel packs keys and values, and how often each is then read by a thread."""


@dataclass(frozen=True)
class Flash:
    """The kernel on so many documents and (H, K) heads of D numbers, with (L, S) tokens, in `number` bytes each.

    `packs` names the low precision for which the processor has tiles (AMX), whose operands are packed: none otherwise.
    """

    batch: int
    heads: tuple[int, int]
    tokens: tuple[int, int]
    head_dim: int
    number: int
    threads: int
    causal: bool = False
    packs: Literal["bf16", "fp16"] | None = None

    def forward(self) -> int:
        """Return the bytes of each thread's scores, sums and output, of low scores rounded, and of packed operands."""
        queries, scores = flash_split(*self.tokens)
        wide = self.threads * (scores + queries * (2 + self.head_dim)) * FLOAT
        if self.number == FLOAT:
            return wide
        packed = self._is_packed()
        rounded = queries * (_even(self._keys_at_once) if packed else self._keys_at_once)
        return wide + self.threads * rounded * self.number + (self._packed(queries) if packed else 0)

    def backward(self) -> int:
        """Return the bytes of each thread's scores and their gradients, of low ones rounded too."""
        scores = self.threads * 2 * flash_split(*self.tokens)[1]
        return scores * (FLOAT if self.number == FLOAT else FLOAT + self.number)

    @property
    def _keys_at_once(self) -> int:
        return min(self.tokens[1], SPLIT_KEYS)

    def _is_packed(self) -> bool:
        """Tell whether the products of a thread outnumber what there is to pack by enough."""
        (H, K), (L, S) = self.heads, self.tokens
        if self.packs is None:
            return False
        least, often = LEAST_TO_PACK[self.packs]
        queries = flash_split(L, S)[0]
        blocks = -(-self.batch * H * -(-L // queries) // self.threads)
        products = blocks * queries * (min(L, S) if self.causal else S)
        return min(L, S) >= least and products >= often * self.batch * K * S

    def _packed(self, queries: int) -> int:
        """Return the bytes of packed keys and values, of a block of keys in each thread, of queries of odd width."""
        (_, K), (_, S), D = self.heads, self.tokens, self.head_dim
        whole, rest = divmod(S - 1, self._keys_at_once)
        keys = self.batch * K * _even(D) * S
        values = self.batch * K * D * (whole * _even(self._keys_at_once) + _even(rest + 1))
        padded = queries * _even(D) if D % 2 else 0
        return (keys + values + self.threads * (padded + self._keys_at_once * D)) * self.number


def flash_split(length: int, keys: int | None = None) -> tuple[int, int]:
    """Return how many queries the kernel works on at once in a thread, and scores: by 512 keys."""
    queries = min(length, 256 if length >= 768 else 64 if length >= 192 else 32)
    return queries, queries * min(length if keys is None else keys, SPLIT_KEYS)


def _even(number: int) -> int:
    return number + number % 2
