"""A model whose calls go through another library's engine, and which stays the model: same object, same names."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

OTHER_FORWARDS = ("evaluate", "logits")
"""Methods of models that run a forward pass without being called as one: parameters are gathered for them, too."""


class Entered:
    """What a model's class is exchanged for: calls go through an engine, which calls the model itself."""

    _engine: Any
    _inside = False

    def __call__(self, *args: Any, **kwargs: Any) -> Any:
        """Call the engine, or the model where the engine calls it."""
        if self._inside:
            return super().__call__(*args, **kwargs)  # type: ignore[misc]
        self._inside = True
        try:
            return self._engine(*args, **kwargs)
        finally:
            self._inside = False


def enter(model: Any, engine: Any) -> None:
    """Make calls of a model, and of its other methods that are forward passes, go through an engine."""
    model.__dict__["_engine"] = engine  # past nn.Module, which would take it for a module inside of this one
    plain = type(model)
    model.__class__ = type(plain.__name__, (Entered, plain), {"__module__": plain.__module__})
    for name in filter(lambda name: hasattr(model, name), OTHER_FORWARDS):
        model.__dict__[name] = _forward_of(model, getattr(model, name))


def _forward_of(model: Any, method: Callable[..., Any]) -> Callable[..., Any]:
    """Return a method of a model that runs as its forward, with all that surrounds that."""

    def through(*args: Any, **kwargs: Any) -> Any:
        if model._inside:
            return method(*args, **kwargs)
        before = model.__dict__.get("forward")
        model.__dict__["forward"] = method
        try:
            return model(*args, **kwargs)
        finally:
            del model.__dict__["forward"]
            if before is not None:
                model.__dict__["forward"] = before

    return through
