"""Which operations selective recompute keeps: matrix products and attention."""

from __future__ import annotations

import functools
from collections.abc import Iterator, Mapping, Sequence
from contextlib import AbstractContextManager
from typing import Any, TypeAlias

import torch
from torch import Tensor
from torch.utils.checkpoint import CheckpointPolicy, create_selective_checkpoint_contexts

Contexts: TypeAlias = tuple[AbstractContextManager[Any], AbstractContextManager[Any]]
"""Around a block's forward, and around its recomputation."""

PRODUCTS = frozenset({"aten::mm", "aten::addmm", "aten::linear", "aten::_scaled_mm", "aten::_grouped_mm"})
BATCHED_PRODUCTS = frozenset({"aten::bmm", "aten::baddbmm"})
ATTENTION = frozenset(
    {
        "aten::_scaled_dot_product_flash_attention",
        "aten::_scaled_dot_product_flash_attention_for_cpu",
        "aten::_scaled_dot_product_efficient_attention",
        "aten::_scaled_dot_product_cudnn_attention",
        "aten::_scaled_dot_product_fused_attention_overrideable",
        "aten::_flash_attention_forward",
        "aten::_efficient_attention_forward",
        "torch_attn::_varlen_attn",
    }
)
VIEWS = frozenset(
    {"aten::view", "aten::_unsafe_view", "aten::t", "aten::transpose", "aten::detach", "aten::alias", "prim::device"}
)
"""What may stand between a product and the rounding of its result; a fake tensor's device is an operation too."""
CAST = "aten::_to_copy"


@functools.cache
def name_of(operator: Any) -> str:
    """Return an operator's name without its overload; empty for one that writes to its arguments or has no schema."""
    if not isinstance(operator, torch._ops.OpOverload) or operator._schema.is_mutable:
        return ""
    name: str = operator._schema.name
    return name


def is_kept(operator: Any, args: Sequence[Any]) -> bool:
    """Tell whether the output of an operation is kept, from its operator and its arguments.

    A batched product that has more numbers than its two operands together is not: attention scores, where no kernel
    fuses them, are most of a block's memory and little of its work (Korthikanti et al. 2022, arXiv 2205.05198).
    """
    name = name_of(operator)
    if name not in BATCHED_PRODUCTS:
        return name in PRODUCTS or name in ATTENTION
    rows, inner, columns = args[-2].shape[1], args[-1].shape[1], args[-1].shape[2]
    return bool(rows * columns <= inner * (rows + columns))


def is_draw(operator: Any, args: Sequence[Any], kwargs: Mapping[str, Any]) -> bool:
    """Tell whether a kept operation draws random numbers: attention with dropout."""
    if name_of(operator) not in ATTENTION:
        return False
    return any(argument.name == "dropout_p" and value > 0 for argument, value in _bound(operator, args, kwargs))


def written(operator: Any, args: Sequence[Any], kwargs: Mapping[str, Any]) -> list[Any]:
    """Return the arguments that an operation writes to."""
    if not isinstance(operator, torch._ops.OpOverload) or not operator._schema.is_mutable:
        return []
    pairs = _bound(operator, args, kwargs)
    return [value for argument, value in pairs if argument.alias_info is not None and argument.alias_info.is_write]


def _bound(operator: Any, args: Sequence[Any], kwargs: Mapping[str, Any]) -> Iterator[tuple[Any, Any]]:
    """Yield each argument that was given as (declaration, value)."""
    for number, argument in enumerate(operator._schema.arguments):
        if number < len(args):
            yield argument, args[number]
        elif argument.name in kwargs:
            yield argument, kwargs[argument.name]


def tensors(value: Any) -> Iterator[Tensor]:
    """Yield the tensors in a value, containers in it included."""
    if isinstance(value, Tensor):
        yield value
    elif isinstance(value, Mapping):
        yield from tensors(list(value.values()))
    elif isinstance(value, (tuple, list)):
        for part in value:
            yield from tensors(part)


def compiled_contexts(policy: str) -> Contexts:
    """Return what makes a compiled block follow `selective` or `full`: torch's contexts, which its compiler knows.

    For `full` they say no more than their absence would. But without them torch 2.13 takes a compiled block with other
    constants inside, another dropout say, from its cache on disk (pytorch#194658); with them it does not cache it.
    """
    rule = _selective_rule if policy == "selective" else _full_rule
    contexts: Contexts = create_selective_checkpoint_contexts(rule)  # type: ignore[no-untyped-call]
    return contexts


def _selective_rule(context: Any, operator: Any, *args: Any, **kwargs: Any) -> CheckpointPolicy:
    return CheckpointPolicy.MUST_SAVE if is_kept(operator, args) else CheckpointPolicy.PREFER_RECOMPUTE


def _full_rule(context: Any, operator: Any, *args: Any, **kwargs: Any) -> CheckpointPolicy:
    return CheckpointPolicy.PREFER_RECOMPUTE
