"""Modules that compute in a low precision, each made of a plain one by exchanging its class.

Name, parameters, state_dict keys and `isinstance` stay as they were, and copies made with copy.deepcopy compute with
their own parameters.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from functools import cache
from typing import Any, ClassVar

import torch
from torch import Tensor, nn

from bigtrain.amp.linear import linear
from bigtrain.amp.norm import layer_norm, rms_norm
from bigtrain.errors import InputError

WHOLE = (nn.MultiheadAttention,)
"""Modules that read the parameters of modules below them themselves, and so are treated as one."""

SHORTCUTS = (nn.TransformerEncoder, nn.TransformerEncoderLayer)
"""Modules that in inference hand the parameters of modules below them to one kernel."""


class Rounded:
    """What every exchanged class is: a plain one that computes in a low precision."""

    plain: ClassVar[type[nn.Module]]
    dtype: ClassVar[torch.dtype]
    out_dtype: ClassVar[torch.dtype]
    """The dtype of what a linear layer returns: fp32 for the one that makes the logits."""


def round_modules(model: nn.Module, dtype: torch.dtype) -> None:
    """Make each unit of a model compute in a low precision, and the one that makes the logits return them in fp32.

    Raises InputError, before anything is changed, naming a module whose parameters would be read around its class.
    """
    units = [(module, _kind(name, module)) for name, module in compute_units(model)]
    logits = output_layer(model)
    for module, kind in units:
        _exchange(module, kind, dtype, torch.float32 if module is logits else dtype)
    for module in model.modules():
        if isinstance(module, SHORTCUTS):
            _exchange(module, _Shortcut, dtype, dtype)


def plain_modules(model: nn.Module) -> None:
    """Give every module its plain class back."""
    for module in model.modules():
        if isinstance(module, Rounded):
            plain: Any = module.plain
            module.__class__ = plain


def compute_units(model: nn.Module) -> Iterator[tuple[str, nn.Module]]:
    """Yield name and module of what computes as one: modules with parameters of their own and none below them.

    Parameters of a module that has others with parameters below it are not read through a module, and stay as they are.
    """
    inside: set[nn.Module] = set()
    for name, module in model.named_modules():
        if module in inside:
            continue
        below = [child for child in module.modules() if child is not module]
        if isinstance(module, WHOLE):
            inside.update(below)
            yield name, module
        elif _own(module) and not any(_own(child) for child in below):
            yield name, module


def output_layer(model: nn.Module) -> nn.Module | None:
    """Return the linear layer that makes a transformers model's logits, or None for other models."""
    get: Callable[[], object] | None = getattr(model, "get_output_embeddings", None)
    layer = get() if callable(get) else None
    return layer if isinstance(layer, nn.Linear) else None


class _Linear(Rounded):
    weight: Tensor
    bias: Tensor | None

    def forward(self, x: Tensor) -> Tensor:
        """Compute in low precision and keep the input and the parameters, not a copy of them."""
        return linear(x.to(self.dtype), self.weight, self.bias).to(self.out_dtype)


class _Conv1D(Rounded):
    weight: Tensor
    bias: Tensor

    def forward(self, x: Tensor) -> Tensor:
        """Compute the linear layer of transformers' GPT-2, whose weight is (features in, features out)."""
        return linear(x.to(self.dtype), self.weight.T, self.bias)


class _LayerNorm(Rounded):
    weight: Tensor | None
    bias: Tensor | None
    normalized_shape: tuple[int, ...]
    eps: float

    def forward(self, x: Tensor) -> Tensor:
        """Normalize with fp32 statistics."""
        return layer_norm(x.to(self.dtype), self.normalized_shape, self.weight, self.bias, self.eps)


class _RMSNorm(Rounded):
    weight: Tensor
    normalized_shape: tuple[int, ...]
    eps: float | None

    def forward(self, x: Tensor) -> Tensor:
        """Normalize with fp32 statistics."""
        return rms_norm(x.to(self.dtype), self.normalized_shape, self.weight, self.eps)


class _LlamaRMSNorm(Rounded):
    weight: Tensor
    variance_epsilon: float

    def forward(self, hidden_states: Tensor) -> Tensor:
        """Normalize as torch's RMSNorm does, of which this is transformers' own."""
        return rms_norm(hidden_states.to(self.dtype), self.weight.shape, self.weight, self.variance_epsilon)


class _Any(Rounded):
    """A module of unknown insides: it reads rounded parameters, or, given no floating input, has its output rounded.

    So tables are looked up in the precision that they are kept in, and only the rows are rounded.
    """

    def forward(self, *args: Any, **kwargs: Any) -> Any:
        """Run the plain forward, with floating tensors among its arguments rounded."""
        compute: Callable[..., Any] = super().forward  # type: ignore[misc]
        if not any(_is_floating(value) for value in (*args, *kwargs.values())):
            return _rounded(compute(*args, **kwargs), self.dtype)
        args = tuple(_rounded(value, self.dtype) for value in args)
        kwargs = {name: _rounded(value, self.dtype) for name, value in kwargs.items()}
        assert isinstance(self, nn.Module)
        owners = [module._parameters for module in self.modules() if module._parameters]
        kept = [dict(parameters) for parameters in owners]
        try:
            for parameters in owners:
                parameters.update((name, _rounded(value, self.dtype)) for name, value in list(parameters.items()))
            return compute(*args, **kwargs)
        finally:
            for parameters, plain in zip(owners, kept, strict=True):
                parameters.update(plain)


class _Shortcut(Rounded):
    """torch's encoder: its shortcut for inference reads the parameters of its layers around their classes, in fp32."""

    def forward(self, *args: Any, **kwargs: Any) -> Any:
        """Run the plain forward without the shortcut."""
        compute: Callable[..., Any] = super().forward  # type: ignore[misc]
        before = torch.backends.mha.get_fastpath_enabled()
        torch.backends.mha.set_fastpath_enabled(False)
        try:
            return compute(*args, **kwargs)
        finally:
            torch.backends.mha.set_fastpath_enabled(before)


KINDS: dict[Callable[..., Any], type[Rounded]] = {
    nn.Linear.forward: _Linear,
    nn.LayerNorm.forward: _LayerNorm,
    nn.RMSNorm.forward: _RMSNorm,
}
"""How modules are computed whose forward is one of these: subclasses that do not override it, too."""

KINDS_BY_NAME: dict[tuple[str, str], type[Rounded]] = {
    ("bigtrain.models.pointwise", "RMSNorm"): _RMSNorm,
    ("transformers.pytorch_utils", "Conv1D"): _Conv1D,
    ("transformers.models.llama.modeling_llama", "LlamaRMSNorm"): _LlamaRMSNorm,
}
"""The same for classes that cannot be imported here, by module and name."""


def _kind(name: str, module: nn.Module) -> type[Rounded]:
    """Return how a unit is made to compute in low precision."""
    where = f"{name or 'the model'}: {type(module).__name__}"
    if "forward" in vars(module):
        raise InputError(
            f"{where} has a forward of its own beside its class's; give it a class, or use amp.precision=fp32"
        )
    if isinstance(module, nn.RNNBase):
        raise InputError(f"{where} reads its weights around its attributes; use amp.precision=fp32")
    plain = type(module)
    by_name = KINDS_BY_NAME.get((plain.__module__, plain.__name__))
    return by_name or KINDS.get(plain.forward, _Any)


def _exchange(module: Any, kind: Any, dtype: torch.dtype, out_dtype: torch.dtype) -> None:
    plain: Any = type(module)
    module.__class__ = _rounded_class(kind, plain, dtype, out_dtype)


@cache
def _rounded_class(kind: Any, plain: Any, dtype: torch.dtype, out_dtype: torch.dtype) -> Any:
    """Return the class that computes as `kind` does and is otherwise `plain`; one for all modules of that class."""
    members = {"plain": plain, "dtype": dtype, "out_dtype": out_dtype, "__module__": plain.__module__}
    return type(f"{plain.__name__}_{str(dtype).removeprefix('torch.')}", (kind, plain), members)


def _own(module: nn.Module) -> bool:
    return any(parameter is not None for parameter in module._parameters.values())


def _is_floating(value: Any) -> bool:
    return isinstance(value, Tensor) and value.is_floating_point()


def _rounded(value: Any, dtype: torch.dtype) -> Any:
    return value.to(dtype) if _is_floating(value) else value
