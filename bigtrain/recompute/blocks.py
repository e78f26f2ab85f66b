"""Recompute applied: blocks whose forward follows a policy, with the same parameters under the same names."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Sequence
from copy import deepcopy
from functools import partial
from importlib import import_module
from inspect import signature
from types import MethodType
from typing import Any, Literal, TypeAlias, cast, get_args

import torch
from torch import Tensor, nn
from torch.utils.checkpoint import checkpoint

from bigtrain.errors import InputError
from bigtrain.recompute.offload import CudaCopies, Offloader
from bigtrain.recompute.operators import compiled_contexts
from bigtrain.recompute.policy import Policy, check_device, resolve
from bigtrain.recompute.tape import Tape
from bigtrain.uncompiled import leave_out

STATE = "_recompute"
"""The attribute of a block that holds its policy."""

CODES = 64
"""How often blocks may be compiled: sizes, training or not, policies, and places for documents multiply."""

Compiled: TypeAlias = Literal["whole", "parts"]


class Recompute:
    """A block's policy, the forward that it had before, what moves its input if that is offloaded, and compilation."""

    def __init__(self, plain: Callable[..., Any]) -> None:
        self.plain = plain
        self.policy: Policy = "none"
        self.offloader: Offloader | None = None
        self.compiled: Compiled | None = None
        self.size: int | None = None
        self.run = plain
        """What is checkpointed: the plain forward, compiled if the block is not compiled around its recomputation."""

    def set(
        self, policy: Policy, offloader: Offloader | None, compiled: Compiled | None, size: int | None = None
    ) -> None:
        """Take a policy; `run` is compiled where recomputation calls compiled code, rather than being part of it."""
        self.policy, self.offloader, self.compiled, self.size = policy, offloader, compiled, size
        inside = compiled is not None and (policy == "offload" or (policy == "full" and compiled == "parts"))
        self.run = by_size(self.plain, size) if inside else self.plain

    @property
    def around(self) -> bool:
        """Whether the block as a whole is compiled."""
        return self.compiled is not None and self.run is self.plain

    def __deepcopy__(self, memo: dict[int, Any]) -> Recompute:
        """Serve a copy of the block: its own forward, compiled anew."""
        copy = Recompute(deepcopy(self.plain, memo))
        copy.set(self.policy, self.offloader, self.compiled, self.size)
        return copy


def apply(
    blocks: Iterable[nn.Module],
    policy: str | Sequence[str],
    *,
    device: torch.device | str | None = None,
    compiled: Compiled | None = None,
    size: int | None = None,
) -> None:
    """Make blocks recompute in training: `none`, `selective`, `full`, `offload`, or a list with one for each block.

    Loss and gradients stay bitwise the same, dropout included. Blocks are changed in place; parameters and their names
    stay, and applying again replaces what was applied before. In eval mode, and where no gradient is recorded, the
    plain forward runs. `device` is where the blocks will train; without it, where their parameters are.

    `compiled` compiles each block too: "whole" as one graph, which recomputes inside itself, an error if it cannot be
    one; "parts" for blocks that break the graph, which run their compiled parts again, all of them. `size` is the first
    dim of what blocks get first in training, where that is always the same: code for that size is compiled beside the
    code for any.
    Raises InputError for what is no list of modules or an empty one, a list of the wrong length, an unknown name,
    `offload` on another device than CUDA, and `selective` with "parts": compiled code does not show which products it
    holds.
    """
    modules = _modules(blocks)
    if compiled not in (None, *get_args(Compiled)):
        raise InputError(f"recompute: compiled={compiled!r} is none of None, 'whole', 'parts'")
    policies = resolve(policy, len(modules))
    where = torch.device(device) if device is not None else _device_of(modules)
    check_device(policies, where.type)
    if compiled == "parts" and "selective" in policies:
        raise InputError(
            "recompute.policy: 'selective' needs blocks that compile as one graph; use full, or train.compile=false"
        )
    offloader = Offloader(CudaCopies(where)) if "offload" in policies else None
    if compiled is not None:
        leave_out()
    for block, name in zip(modules, policies, strict=True):
        follow(block, name, offloader if name == "offload" else None, compiled, size)


def follow(
    block: nn.Module,
    policy: Policy,
    offloader: Offloader | None = None,
    compiled: Compiled | None = None,
    size: int | None = None,
) -> None:
    """Make one block follow a policy; `offloader` moves the block's input for `offload`."""
    recompute: Recompute | None = block.__dict__.get(STATE)
    if recompute is None:
        if policy == "none" and compiled is None:
            return
        recompute = Recompute(block.forward)
        setattr(block, STATE, recompute)
        # A bound method, and not a closure: a deep copy of the block binds it, and the plain forward, to the copy.
        block.forward = MethodType(_forward, block)
    if recompute.around:
        block._compiled_call_impl = None
    recompute.set(policy, offloader, compiled, size)
    if recompute.around:
        # As `block.compile` does, which takes one way to compile.
        block._compiled_call_impl = by_size(block._call_impl, size, fullgraph=compiled == "whole")


def by_size(call: Callable[..., Any], size: int | None, *, fullgraph: bool = False) -> Callable[..., Any]:
    """Return a call compiled for inputs of all sizes; of the one `size`, in training, for it alone.

    Other sizes, such as those of an evaluation, are left to code of its own, so that no chain of them compiles anew.
    """
    of_any = _compiled(call, dynamic=True, fullgraph=fullgraph)
    if size is None:
        return of_any
    of_one = _compiled(call, dynamic=False, fullgraph=fullgraph)

    def run(*args: Any, **kwargs: Any) -> Any:
        fits = torch.is_grad_enabled() and bool(args) and isinstance(args[0], Tensor) and len(args[0]) == size
        return (of_one if fits else of_any)(*args, **kwargs)

    return run


def _compiled(call: Callable[..., Any], **how: bool) -> Callable[..., Any]:
    """Compile a call, with room for all the code that blocks need, who share one place for it."""
    compiler: Any = torch.compile
    if "recompile_limit" in signature(compiler).parameters:
        return cast("Callable[..., Any]", compiler(call, recompile_limit=CODES, **how))
    config: Any = import_module("torch._dynamo.config")  # torch 2.11 has it for the whole process
    config.recompile_limit = max(CODES, config.recompile_limit)
    return cast("Callable[..., Any]", compiler(call, **how))


def _modules(blocks: Any) -> list[nn.Module]:
    """Return the blocks as a list. Raises InputError for a module that holds them somewhere, and for no blocks."""
    if isinstance(blocks, nn.Module) and not isinstance(blocks, Iterable):
        name = type(blocks).__name__
        raise InputError(f"recompute: a {name} is no list of blocks; give the one inside it, such as model.layers")
    modules = list(blocks)
    for block in modules:
        if not isinstance(block, nn.Module):
            raise InputError(f"recompute: a {type(block).__name__} stands where a block should; give a list of modules")
    if not modules:
        raise InputError("recompute: the list of blocks is empty; give the model's repeated blocks")
    return modules


def _device_of(modules: Sequence[nn.Module]) -> torch.device:
    parameters = (parameter for module in modules for parameter in module.parameters())
    return next((parameter.device for parameter in parameters), torch.device("cpu"))


def _forward(block: nn.Module, *args: Any, **kwargs: Any) -> Any:
    """Run a block as its policy says."""
    recompute: Recompute = getattr(block, STATE)
    if recompute.policy == "none" or not (block.training and torch.is_grad_enabled()):
        return recompute.run(*args, **kwargs)
    _refuse_cache((*args, *kwargs.values()))
    run, inputs = _positional(recompute.run, args, kwargs)
    if recompute.around and torch.compiler.is_compiling():
        contexts = partial(compiled_contexts, recompute.policy)
        return checkpoint(run, *inputs, use_reentrant=False, context_fn=contexts)
    if recompute.policy == "selective":
        return _selective(run, inputs)
    if recompute.offloader is None:
        return checkpoint(run, *inputs, use_reentrant=False)
    with recompute.offloader.inputs():
        return checkpoint(run, *inputs, use_reentrant=False)


def _selective(run: Callable[..., Any], args: Sequence[Any]) -> Any:
    tape = Tape()
    out = checkpoint(run, *args, use_reentrant=False, context_fn=tape.contexts)
    # What the caller does with the block's output, in place even, must not reach what is kept.
    tape.forget(out)
    return out


def _positional(
    plain: Callable[..., Any], args: tuple[Any, ...], kwargs: dict[str, Any]
) -> tuple[Callable[..., Any], tuple[Any, ...]]:
    """Return a function and its positional arguments, tensors given by keyword among them.

    Checkpointing keeps positional tensors as autograd does, and all else by reference.
    """
    if not kwargs:
        return plain, args
    names = [name for name, value in kwargs.items() if isinstance(value, Tensor)]
    rest = {name: value for name, value in kwargs.items() if name not in names}
    count = len(args)

    def run(*given: Any) -> Any:
        return plain(*given[:count], **rest, **dict(zip(names, given[count:], strict=True)))

    return run, (*args, *(kwargs[name] for name in names))


def _refuse_cache(values: Iterable[Any]) -> None:
    """Raise InputError if a block is given a key-value cache, to which it would write a second time."""
    for value in values:
        if hasattr(value, "get_seq_length"):
            raise InputError(
                f"recompute: a block got a {type(value).__name__}, and running it again would write to that twice; "
                "train with use_cache=False (model.config.use_cache = False)"
            )
