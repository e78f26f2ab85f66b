"""Functions that stay out of compiled graphs, without loading the compiler for whoever does not compile.

`torch.compiler.disable` loads it at once: 70 MB of resident memory, and a second, also where nothing is compiled.
"""

from __future__ import annotations

from collections.abc import Callable
from functools import wraps
from typing import Any, TypeVar

import torch

Function = TypeVar("Function", bound=Callable[..., Any])

_left_out: list[_LeftOut] = []


class _LeftOut:
    """A function, or once something is to be compiled that in torch's wrapper."""

    def __init__(self, function: Callable[..., Any]) -> None:
        self.call = function
        _left_out.append(self)


def uncompiled(function: Function) -> Function:
    """Return a function that compiled code calls as it is, once `leave_out` was called."""
    chosen = _LeftOut(function)

    @wraps(function)
    def call(*args: Any, **options: Any) -> Any:
        return chosen.call(*args, **options)

    return call  # type: ignore[return-value]


def leave_out() -> None:
    """Keep all such functions out of what is compiled from now on, as whoever compiles must say."""
    while _left_out:
        left_out = _left_out.pop()
        left_out.call = torch.compiler.disable(left_out.call)  # type: ignore[no-untyped-call]
