"""What cannot be traced, in words: the operation and the module that asked for numbers."""

from __future__ import annotations

from types import TracebackType

from torch import nn
from torch._subclasses.fake_tensor import (
    DataDependentOutputException,
    DynamicOutputShapeException,
    UnsupportedOperatorException,
)

UNTRACEABLE = (DataDependentOutputException, DynamicOutputShapeException, UnsupportedOperatorException)
"""What fake tensors raise where an operation reads numbers, or a shape depends on them."""


def explained(error: BaseException) -> str:
    """Return where a trace met an operation that it cannot run, and what to do about it."""
    operator = getattr(error, "func", None) or error
    where = _module_of(error.__traceback__)
    return (
        f"{where}: {operator} needs numbers, and a traced model has shapes only; keep such tensors real "
        "(real=..., by their names in the sample), or compute lengths and conditions before the model"
    )


def _module_of(traceback: TracebackType | None) -> str:
    """Return the name and class of the innermost module in a traceback, seen from the outermost."""
    modules: list[nn.Module] = []
    while traceback is not None:
        inside = traceback.tb_frame.f_locals.get("self")
        if isinstance(inside, nn.Module):
            modules.append(inside)
        traceback = traceback.tb_next
    if not modules:
        return "the traced call"
    names = [name for name, module in modules[0].named_modules() if module is modules[-1]]
    return f"{names[0]} ({type(modules[-1]).__name__})" if names and names[0] else type(modules[-1]).__name__
