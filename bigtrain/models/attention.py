"""Attention inside documents that lie end to end in one flat row: no padding, no mask.

N tokens of the flat row, W width, H query heads, K key and value heads, D numbers per head,
R documents of equal length in a run, L tokens in each.
"""

from __future__ import annotations

import inspect
from collections.abc import Callable, Sequence
from functools import cached_property
from itertools import accumulate, groupby
from typing import Any, Literal

import torch
import torch.nn.functional as F
from torch import Tensor

varlen_attn: Callable[..., Any] | None
try:
    from torch.nn.attention.varlen import varlen_attn
except ImportError:
    varlen_attn = None

VARLEN_PARAMETERS = frozenset(inspect.signature(varlen_attn).parameters) if varlen_attn else frozenset()
"""What torch's variable-length attention takes: it changed between torch 2.11 and 2.13."""

AttentionPath = Literal["varlen", "per_document"]


class Documents:
    """Where the documents of a flat row lie, prepared once for all blocks of a forward.

    `cu_seqlens` (K+1,) int32 holds the boundaries. Without `max_seqlen`, and for the lengths that the path by document
    needs, the boundaries are read back to the host, which waits for a GPU.
    """

    def __init__(self, cu_seqlens: Tensor, max_seqlen: int | None = None, lengths: Sequence[int] | None = None) -> None:
        self.cu_seqlens = cu_seqlens
        self.fused = varlen_available(cu_seqlens.device)
        if lengths is not None:
            self.lengths = list(lengths)
        self.max_seqlen = max(self.lengths, default=0) if max_seqlen is None else max_seqlen

    @classmethod
    def of_lengths(cls, lengths: Sequence[int], device: torch.device | str = "cpu") -> Documents:
        """Place documents of these lengths one after the other; nothing is read back from the device."""
        boundaries = torch.tensor([0, *accumulate(lengths)], dtype=torch.int32, device=device)
        return cls(boundaries, lengths=lengths)

    @cached_property
    def lengths(self) -> list[int]:
        """Tokens of each document, on the host."""
        return self.cu_seqlens.diff().tolist()

    @cached_property
    def runs(self) -> list[tuple[int, int]]:
        """Neighbours of equal length as (documents, length): each run is one dense batch, and a view of the row."""
        filled = (length for length in self.lengths if length)
        return [(len(list(run)), length) for length, run in groupby(filled)]


def varlen_available(device: torch.device) -> bool:
    """Say whether torch's variable-length attention runs here: its kernel needs compute capability 8.0."""
    return device.type == "cuda" and varlen_attn is not None and torch.cuda.get_device_capability(device) >= (8, 0)


def attention_path(fused: bool, dtype: torch.dtype, head_dim: int, dropout: float) -> AttentionPath:
    """Choose how attention runs: `varlen`, one kernel for all documents, or `per_document`, exact on every device.

    `fused` says whether the device has the kernel. The kernel takes fp16 and bf16, heads of up to 256 numbers in
    multiples of 8, and has no dropout.
    """
    half = dtype in (torch.float16, torch.bfloat16)
    return "varlen" if fused and half and dropout == 0 and head_dim <= 256 and head_dim % 8 == 0 else "per_document"


def attend(
    q_NHD: Tensor, k_NKD: Tensor, v_NKD: Tensor, documents: Documents, *, causal: bool, dropout: float
) -> Tensor:
    """Attend from each token to its own document; causal: up to itself. Returns (N, H, D).

    H must be a multiple of K: neighbouring query heads share keys and values. `dropout` acts on the probabilities.
    """
    if attention_path(documents.fused, q_NHD.dtype, q_NHD.shape[-1], dropout) == "varlen":
        return attend_varlen(q_NHD, k_NKD, v_NKD, documents, causal=causal)
    out_NHD: Tensor = attend_per_document(q_NHD, k_NKD, v_NKD, documents, causal=causal, dropout=dropout)
    return out_NHD


def attend_varlen(q_NHD: Tensor, k_NKD: Tensor, v_NKD: Tensor, documents: Documents, *, causal: bool) -> Tensor:
    """Attend in one kernel for all documents."""
    assert varlen_attn is not None
    options: dict[str, Any] = {}
    if causal:
        options = {"is_causal": True} if "is_causal" in VARLEN_PARAMETERS else {"window_size": (-1, 0)}
    if q_NHD.shape[1] != k_NKD.shape[1]:
        if "enable_gqa" in VARLEN_PARAMETERS:
            options["enable_gqa"] = True
        else:
            shared = q_NHD.shape[1] // k_NKD.shape[1]
            k_NKD, v_NKD = k_NKD.repeat_interleave(shared, 1), v_NKD.repeat_interleave(shared, 1)
    ends, longest = documents.cu_seqlens, documents.max_seqlen
    out_NHD: Tensor = varlen_attn(q_NHD, k_NKD, v_NKD, ends, ends, longest, longest, **options)
    return out_NHD


@torch.compiler.disable  # type: ignore[untyped-decorator]
def attend_per_document(
    q_NHD: Tensor, k_NKD: Tensor, v_NKD: Tensor, documents: Documents, *, causal: bool, dropout: float
) -> Tensor:
    """Attend run by run; split in one call, whose backward is one `cat`: a slice each would each fill a whole row."""
    sizes = [count * length for count, length in documents.runs]
    if not sizes:
        return q_NHD
    gathered = [tensor.split_with_sizes(sizes) if len(sizes) > 1 else (tensor,) for tensor in (q_NHD, k_NKD, v_NKD)]
    outs = []
    for (count, length), q, k, v in zip(documents.runs, *gathered, strict=True):
        q_RHLD, k_RKLD, v_RKLD = (part.unflatten(0, (count, length)).transpose(1, 2) for part in (q, k, v))
        out_RHLD = F.scaled_dot_product_attention(
            q_RHLD, k_RKLD, v_RKLD, is_causal=causal, dropout_p=dropout, enable_gqa=q.shape[1] != k.shape[1]
        )
        outs.append(out_RHLD.transpose(1, 2).flatten(0, 1))
    return torch.cat(outs) if len(outs) > 1 else outs[0]
