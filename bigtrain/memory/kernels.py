"""What torch's kernels for CPUs do that their fake counterparts do not show: room inside them, dtypes, work in place.

Each fact is of aten/src/ATen/native, torch 2.11 to 2.13, and was seen in a profile. What is below a few hundred bytes
(scalars as tensors, indices) is left out.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from typing import Any, Literal

import torch
from torch import Tensor

from bigtrain.models.flash_cost import Flash, flash_split
from bigtrain.processor import has_tiles

TRANSPOSED_SIDE = 60
"""A transposed matrix is copied through a square of this side, if it has at least as many numbers as one (Copy.cpp)."""


def inner_bytes(name: str, args: Sequence[Any], kwargs: Mapping[str, Any], out: Any) -> int:
    """Return the most bytes that an operation on the CPU holds, beside what it returns, until it returns."""
    rule = _INNER.get(name)
    return 0 if rule is None else rule(args, kwargs, out)


def corrected(name: str, args: Sequence[Any], out: Any) -> Any:
    """Return an operation's fake output with the dtypes that the kernel for CPUs gives it.

    LayerNorm of a low-precision input under fp32 weights leaves fp32 statistics (layer_norm.cpp, is_mixed_type).
    """
    if name != "aten::native_layer_norm" or args[2] is None or args[2].dtype == args[0].dtype:
        return out
    return (out[0], *(statistic.to(args[2].dtype) for statistic in out[1:]))


def in_place(operator: Any, node: str) -> Any | None:
    """Return the operation that autograd runs instead where no dispatch mode is active, on zeros that it just made.

    Their formulas write out of place only for tensors that might be subclasses (FunctionsManual.cpp).
    """
    return _IN_PLACE.get((operator, node))


def dense(tensor: Tensor) -> bool:
    """Tell whether autograd may add to a gradient in place, by its layout (input_buffer.cpp)."""
    expected = 1
    for stride, size in sorted((s, n) for s, n in zip(tensor.stride(), tensor.shape, strict=True) if n != 1):
        if stride != expected:
            return False
        expected *= size
    return True


_IN_PLACE = {
    (torch.ops.aten.index_put.default, "IndexBackward0"): torch.ops.aten.index_put_.default,
    (torch.ops.aten._unsafe_index_put.default, "IndexBackward0"): torch.ops.aten.index_put_.default,
    (torch.ops.aten.scatter_add.default, "GatherBackward0"): torch.ops.aten.scatter_add_.default,
    (torch.ops.aten.index_add.default, "IndexSelectBackward0"): torch.ops.aten.index_add_.default,
}

Rule = Callable[[Sequence[Any], Mapping[str, Any], Any], int]


def _dropout(args: Sequence[Any], kwargs: Mapping[str, Any], out: Any) -> int:
    """Hold the mask as numbers while the product is made (Dropout.cpp)."""
    first: Tensor = out[0] if isinstance(out, tuple) else out
    return first.nbytes


def _sum(args: Sequence[Any], kwargs: Mapping[str, Any], out: Tensor) -> int:
    """Hold the input in the dtype of the sum (ReduceOpsUtils.h, make_reduction)."""
    return 0 if args[0].dtype == out.dtype else args[0].numel() * out.itemsize


def _safe_softmax(args: Sequence[Any], kwargs: Mapping[str, Any], out: Tensor) -> int:
    """Hold which numbers are -inf, and which rows only have such (transformers/attention.cpp)."""
    return out.numel() + out.numel() // max(1, out.shape[-1])


def _layer_norm_backward(args: Sequence[Any], kwargs: Mapping[str, Any], out: Any) -> int:
    """Hold each thread's sums for the weight and the bias (layer_norm_kernel.cpp)."""
    width = 1
    for size in args[2]:
        width *= size
    return 2 * torch.get_num_threads() * width * int(args[1].itemsize)


def _flash(args: Sequence[Any], kwargs: Mapping[str, Any], out: Any) -> int:
    """Hold what flash attention's threads work in, and packed keys and values on processors with tiles."""
    causal = args[4] if len(args) > 4 else kwargs.get("is_causal", False)
    return _kernel(args[0], args[1], causal=bool(causal)).forward()


def _flash_backward(args: Sequence[Any], kwargs: Mapping[str, Any], out: Any) -> int:
    """Hold what each thread works in, of low-precision inputs with a sum for each query."""
    query, key = args[1], args[2]
    sums = 4 * flash_split(query.shape[2])[0] if query.itemsize < 4 else 0
    return _kernel(query, key).backward() + torch.get_num_threads() * sums


def _kernel(query: Tensor, key: Tensor, *, causal: bool = False) -> Flash:
    """Return the cost of flash attention of queries (B, H, L, D) on keys (B, K, S, D)."""
    B, H, L, D = query.shape
    _, K, S, _ = key.shape
    name = _LOW.get(query.dtype)
    packs = name if name is not None and has_tiles(name) else None
    return Flash(B, (H, K), (L, S), D, query.itemsize, torch.get_num_threads(), causal, packs)


_LOW: dict[torch.dtype, Literal["bf16", "fp16"]] = {torch.bfloat16: "bf16", torch.float16: "fp16"}


def _copy(args: Sequence[Any], kwargs: Mapping[str, Any], out: Tensor) -> int:
    """Hold a square of a transposed matrix on its way into a contiguous one."""
    source = args[1] if len(args) > 1 and isinstance(args[1], Tensor) else args[0]
    if source.dim() != 2 or source.dtype != out.dtype or source.numel() < TRANSPOSED_SIDE**2:
        return 0
    transposed = source.stride(0) == 1 and source.stride(1) == source.shape[0] and out.is_contiguous()
    return TRANSPOSED_SIDE**2 * out.itemsize if transposed else 0


_INNER: dict[str, Rule] = {
    "aten::native_dropout": _dropout,
    "aten::native_dropout_backward": _dropout,
    "aten::sum": _sum,
    "aten::_safe_softmax": _safe_softmax,
    "aten::native_layer_norm_backward": _layer_norm_backward,
    "aten::_scaled_dot_product_flash_attention_for_cpu": _flash,
    "aten::_scaled_dot_product_flash_attention_for_cpu_backward": _flash_backward,
    "aten::copy_": _copy,
    "aten::clone": _copy,
}
