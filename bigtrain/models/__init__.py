"""The models: BERT, GPT-2 and Llama-style decoders on one flat row of tokens, without padding.

`build_model` is loaded when it is asked for, so that `bigtrain.models.shape` needs no torch.
"""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from bigtrain.models.build import build_model

__all__ = ["build_model"]


def __getattr__(name: str) -> Any:
    if name == "build_model":
        from bigtrain.models.build import build_model

        return build_model
    raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
