"""Attention inside documents that lie end to end in one flat row: no padding, no mask.

N tokens of the flat row, W width, H query heads, K key and value heads, G = H + 2K, D numbers per head,
R documents of equal length in a run, L tokens in each.
"""

from __future__ import annotations

import inspect
from collections.abc import Callable, Sequence
from contextlib import suppress
from functools import cached_property
from itertools import accumulate, groupby
from typing import Any, Literal

import torch
import torch.nn.functional as F
from torch import Tensor

from bigtrain.products import widened
from bigtrain.uncompiled import uncompiled

varlen_attn: Callable[..., Any] | None = None
if torch.cuda.is_available():  # it would load torch's compiler, for a kernel that the CPU has not
    with suppress(ImportError):
        from torch.nn.attention.varlen import varlen_attn

VARLEN_PARAMETERS = frozenset(inspect.signature(varlen_attn).parameters) if varlen_attn else frozenset()
"""What torch's variable-length attention takes: it changed between torch 2.11 and 2.13."""

AttentionPath = Literal["varlen", "in_place", "per_document"]


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


def attention_path(
    device: torch.device, fused: bool, dtype: torch.dtype, head_dim: int, dropout: float
) -> AttentionPath:
    """Choose how attention runs.

    `varlen` is one kernel for all documents; `fused` says whether the device has it. It takes fp16 and bf16, heads of
    up to 256 numbers in multiples of 8, and has no dropout. `in_place`, for CPUs without dropout, goes from document to
    document and keeps nothing but the queries, keys and values, the output and a number for each token and head.
    `per_document` is exact on every device.
    """
    half = dtype in (torch.float16, torch.bfloat16)
    if fused and half and dropout == 0 and head_dim <= 256 and head_dim % 8 == 0:
        return "varlen"
    return "in_place" if device.type == "cpu" and dropout == 0 else "per_document"


def attend(qkv_NGD: Tensor, heads: tuple[int, int], documents: Documents, *, causal: bool, dropout: float) -> Tensor:
    """Attend from each token to its own document; causal: up to itself. (N, H + 2K, D) to (N, H, D).

    `heads` are H and K: the queries come first, then the keys, then the values. H must be a multiple of K: neighbouring
    query heads share keys and values. `dropout` acts on the probabilities.
    """
    H, K = heads
    path = attention_path(qkv_NGD.device, documents.fused, qkv_NGD.dtype, qkv_NGD.shape[-1], dropout)
    if path == "in_place":
        in_place: Tensor = attend_in_place(qkv_NGD, heads, documents, causal)
        return in_place
    q_NHD, k_NKD, v_NKD = qkv_NGD.split_with_sizes([H, K, K], dim=1)
    if path == "varlen":
        return in_use.call(q_NHD, k_NKD, v_NKD, documents.cu_seqlens, documents.max_seqlen, causal)
    out_NHD: Tensor = attend_per_document(q_NHD, k_NKD, v_NKD, documents, causal=causal, dropout=dropout)
    return out_NHD


def attend_varlen(
    q_NHD: Tensor, k_NKD: Tensor, v_NKD: Tensor, cu_seqlens: Tensor, max_seqlen: int, causal: bool
) -> Tensor:
    """Attend in one kernel for all documents: the one that torch has, or has been told to take."""
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
    out_NHD: Tensor = varlen_attn(q_NHD, k_NKD, v_NKD, cu_seqlens, cu_seqlens, max_seqlen, max_seqlen, **options)
    return out_NHD


Call = Callable[[Tensor, Tensor, Tensor, Tensor, int, bool], Tensor]
"""Queries (N, H, D), keys and values (N, K, D), boundaries, the longest document, causal: to the output (N, H, D)."""


class InUse:
    """The kernel that attends to all documents at once; `attention_kernels` chooses it at the start of a run."""

    call: Call = staticmethod(attend_varlen)


in_use = InUse()


@uncompiled
def attend_in_place(qkv_NGD: Tensor, heads: tuple[int, int], documents: Documents, causal: bool) -> Tensor:
    """Attend document by document into one output, and in the backward pass into one gradient."""
    lengths = [length for length in documents.lengths if length]
    # The kernel takes it, unchecked, that the numbers of a head are neighbours.
    out_NHD: Tensor = _InPlace.apply(qkv_NGD.contiguous(), heads, lengths, causal)  # type: ignore[no-untyped-call]
    return out_NHD


class _InPlace(torch.autograd.Function):
    """torch's flash attention for CPUs on one document after the other; each needs room for itself only."""

    @staticmethod
    def forward(ctx: Any, qkv_NGD: Tensor, heads: tuple[int, int], lengths: list[int], causal: bool) -> Tensor:
        ctx.heads, ctx.lengths, ctx.causal = heads, lengths, causal
        out_NHD = qkv_NGD.new_empty(qkv_NGD.shape[0], heads[0], qkv_NGD.shape[2])
        parts = zip(*(tensor.split_with_sizes(lengths) for tensor in (qkv_NGD, out_NHD)), strict=True)
        sums = [_attend_document(qkv_LGD, out_LHD, heads, causal) for qkv_LGD, out_LHD in parts]
        ctx.save_for_backward(qkv_NGD, out_NHD, *sums)
        return out_NHD

    @staticmethod
    def backward(ctx: Any, grad_NHD: Tensor) -> tuple[Tensor, None, None, None]:
        qkv_NGD, out_NHD, *sums = ctx.saved_tensors
        grad_NGD = torch.empty_like(qkv_NGD)
        parts = (tensor.split_with_sizes(ctx.lengths) for tensor in (grad_NHD, qkv_NGD, out_NHD, grad_NGD))
        for above_LHD, qkv_LGD, out_LHD, grad_LGD, sum_1HL in zip(*parts, sums, strict=True):
            _differentiate_document(above_LHD, qkv_LGD, out_LHD, grad_LGD, sum_1HL, ctx.heads, ctx.causal)
        return grad_NGD, None, None, None


def _attend_document(qkv_LGD: Tensor, out_LHD: Tensor, heads: tuple[int, int], causal: bool) -> Tensor:
    """Write a document's output and return its log-sum-exp."""
    out_1HLD, sum_1HL = _flash(*_queries_keys_values(qkv_LGD, heads), 0.0, causal)
    out_LHD.copy_(out_1HLD[0].transpose(0, 1))
    log_sum_1HL: Tensor = sum_1HL
    return log_sum_1HL


def _differentiate_document(
    above_LHD: Tensor,
    qkv_LGD: Tensor,
    out_LHD: Tensor,
    grad_LGD: Tensor,
    sum_1HL: Tensor,
    heads: tuple[int, int],
    causal: bool,
) -> None:
    """Write the gradient of a document's queries, keys and values."""
    q, k, v = _queries_keys_values(qkv_LGD, heads)
    above, out = (part.to(q.dtype).transpose(0, 1)[None] for part in (above_LHD, out_LHD))
    grads = _flash_backward(above, q, k, v, out, sum_1HL, 0.0, causal)
    for place_LXD, grad_1XLD in zip(_by_kind(grad_LGD, heads), grads, strict=True):
        place_LXD.copy_(grad_1XLD[0].transpose(0, 1))


_flash = torch.ops.aten._scaled_dot_product_flash_attention_for_cpu
_flash_backward = torch.ops.aten._scaled_dot_product_flash_attention_for_cpu_backward


def _by_kind(qkv_LGD: Tensor, heads: tuple[int, int]) -> tuple[Tensor, ...]:
    return qkv_LGD.split_with_sizes([heads[0], heads[1], heads[1]], dim=1)


def _queries_keys_values(qkv_LGD: Tensor, heads: tuple[int, int]) -> list[Tensor]:
    """Return what the kernel takes, (1, H or K, L, D), in a dtype whose products this processor is good at."""
    dtype = torch.float32 if widened(qkv_LGD) else qkv_LGD.dtype
    return [part.to(dtype).transpose(0, 1)[None] for part in _by_kind(qkv_LGD, heads)]


@uncompiled
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
