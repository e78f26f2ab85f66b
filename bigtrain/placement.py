"""A model onto its device, built there and initialised if it was on the meta device; which of its modules repeat."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor, nn

from bigtrain.errors import InputError


def place(model: nn.Module, device: torch.device, *, seed: int) -> None:
    """Move a model to a device; parameters on the meta device are created there and initialised from the seed.

    Modules are initialised by their `reset_parameters`, or by the `_init_weights` of a transformers model.
    Raises InputError naming the first module that has parameters or buffers and neither.
    """
    tensors = [*model.parameters(), *model.buffers()]
    if not any(tensor.is_meta for tensor in tensors):
        if not all(_stands_on(tensor, device) for tensor in tensors):  # fake tensors cannot be moved, nor need they
            model.to(device)
        return
    if not all(tensor.is_meta for tensor in tensors):
        raise InputError("the model is partly on the meta device; build all of it there, or all on a real device")
    tied = _tied_parameters(model)
    model.to_empty(device=device)
    for first, *others in tied:
        for name in others:
            _set_parameter(model, name, model.get_parameter(first))
    torch.manual_seed(seed)
    of_transformers: Any = getattr(model, "_init_weights", None)
    if callable(of_transformers):
        model.apply(of_transformers)  # children first: a parent scales some of its children's weights afterwards
        return
    for name, module in model.named_modules():
        _initialise(name, module)


def _stands_on(tensor: Tensor, device: torch.device) -> bool:
    return tensor.device.type == device.type and device.index in (None, tensor.device.index)


def _initialise(name: str, module: nn.Module) -> None:
    its_own: Any = getattr(module, "reset_parameters", None)
    if callable(its_own):
        its_own()
    elif [*module.parameters(recurse=False), *module.buffers(recurse=False)]:
        raise InputError(
            f"{name or 'the model'}: {type(module).__name__} is on the meta device and has no reset_parameters(); "
            "add one, or build the model on a real device"
        )


def _tied_parameters(model: nn.Module) -> list[list[str]]:
    """Return the names of each parameter that stands in several places."""
    names: dict[int, list[str]] = {}
    for name, parameter in model.named_parameters(remove_duplicate=False):
        names.setdefault(id(parameter), []).append(name)
    return [group for group in names.values() if len(group) > 1]


def _set_parameter(model: nn.Module, name: str, parameter: nn.Parameter) -> None:
    parent, _, attribute = name.rpartition(".")
    setattr(model.get_submodule(parent), attribute, parameter)


def find_blocks(model: nn.Module, blocks: type[nn.Module] | Sequence[nn.Module] | None = None) -> list[nn.Module]:
    """Return a model's repeated blocks: those given, all modules of a class, or the members of its longest ModuleList.

    Raises InputError if there are none, or if one is no module of the model.
    """
    if isinstance(blocks, type):
        found = [module for module in model.modules() if isinstance(module, blocks)]
    elif blocks is not None:
        found = list(blocks)
        inside = set(model.modules())
        if strange := [module for module in found if module not in inside]:
            raise InputError(
                f"{type(model).__name__}: a {type(strange[0]).__name__} among the blocks is not part of it"
            )
    else:
        lists = [list(module) for module in model.modules() if isinstance(module, nn.ModuleList)]
        found = max(lists, key=len, default=[])
    if not found:
        wanted = f"module of class {blocks.__name__}" if isinstance(blocks, type) else "ModuleList of blocks"
        raise InputError(f"{type(model).__name__}: has no {wanted}; name the class of its blocks with blocks=...")
    return found
