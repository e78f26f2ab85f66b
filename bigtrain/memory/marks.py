"""Marks in a profile that say what a step is doing, and the addresses of the tensors whose purpose is known."""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Mapping, Sequence
from contextlib import ExitStack, contextmanager
from typing import Any

from torch import Tensor, nn
from torch.optim import Optimizer
from torch.profiler import record_function

from bigtrain.distributed_tensors import is_distributed, is_sharded, local_part
from bigtrain.memory.measure import MARK

PHASES = ("forward", "backward", "update")
BLOCK, GRADIENT, STEP = "block ", "gradient ", "step "
"""How the marks are named of a block's forward, of a gradient's address, and of a step."""
REMAINDER = "remainder"
"""The optimizer's state that belongs to the weights: what `amp.master_weights: split24` keeps beside them."""


def mark(name: str) -> Any:
    """Return a context in which a profile shows that something is being done: a phase, a step or a block."""
    return record_function(MARK + name)


@contextmanager
def marked(model: nn.Module, blocks: Sequence[str]) -> Iterator[None]:
    """Mark the forward of each block, by its name, and each gradient as it arrives, as long as this lasts."""
    with ExitStack() as hooks:
        for name in blocks:
            _mark_forward(hooks, model.get_submodule(name), name)
        if is_sharded(model):
            _mark_gathered(hooks, model, blocks)
        else:
            for name, parameter in model.named_parameters():
                _mark_gradient(hooks, parameter, place_of(name, blocks))
        yield


def _mark_gathered(hooks: ExitStack, model: nn.Module, blocks: Sequence[str]) -> None:
    """Mark the gradients of parameters that are gathered: each is there from its first forward on."""
    known: set[int] = set()

    def gathered(module: nn.Module, *_: Any) -> None:
        prefix = names[module]
        for name, parameter in module.named_parameters(prefix=prefix):
            if not is_distributed(parameter) and id(parameter) not in known:
                known.add(id(parameter))
                _mark_gradient(hooks, parameter, place_of(name, blocks))

    names = {model.get_submodule(name): name for name in ("", *blocks)}
    for module in names:
        if getattr(module, "_compiled_call_impl", None) is None:
            hooks.callback(module.register_forward_pre_hook(gathered).remove)


def mark_gradients(model: nn.Module, blocks: Sequence[str]) -> None:
    """Mark the gradients that are there now, as after a backward pass, by their addresses."""
    for name, parameter in model.named_parameters():
        if parameter.grad is not None:
            _name_gradient(parameter.grad, place_of(name, blocks))


def place_of(name: str, blocks: Iterable[str]) -> str:
    """Return the block to which a parameter belongs by its name; an empty text for none."""
    return next((block for block in blocks if name.startswith(f"{block}.")), "")


def tensors_kept(
    model: nn.Module,
    optimizer: Optimizer,
    blocks: Sequence[str],
    parameters: Mapping[str, nn.Parameter] | None = None,
) -> dict[int, tuple[str, str]]:
    """Return cause and place of what weights and optimizer hold, by the addresses of their memory.

    `parameters` are what the optimizer has, by name, where those are not the model's.
    """
    found: dict[int, tuple[str, str]] = {}
    for name, parameter in (dict(model.named_parameters()) if parameters is None else parameters).items():
        place = place_of(name, blocks)
        for key, value in optimizer.state.get(parameter, {}).items():
            cause = "master_weights" if key == REMAINDER else "optimizer_state"
            found |= {address(tensor): (cause, place) for tensor in tensors_in(value)}
        found[address(parameter)] = ("weights", place)
    found |= {address(buffer): ("weights", place_of(name, blocks)) for name, buffer in model.named_buffers()}
    return found


def tensors_in(value: object) -> Iterator[Tensor]:
    """Yield the tensors of an optimizer's state: itself, or those that it holds at any depth."""
    inside: Iterable[object] = ()
    if isinstance(value, Tensor):
        yield value
    elif isinstance(value, Mapping):
        inside = value.values()
    elif isinstance(value, list | tuple):
        inside = value
    for part in inside:
        yield from tensors_in(part)


def address(tensor: Tensor) -> int:
    """Return where a tensor's memory begins; of a sharded one, that of this rank's part."""
    return local_part(tensor).untyped_storage().data_ptr()


def _mark_forward(hooks: ExitStack, block: Any, name: str) -> None:
    """Mark a block's forward: by its hooks, or around what it was compiled to, which new hooks would compile again."""
    compiled = getattr(block, "_compiled_call_impl", None)
    if compiled is not None:

        def call(*args: Any, **kwargs: Any) -> Any:
            with mark(BLOCK + name):
                return compiled(*args, **kwargs)

        block._compiled_call_impl = call
        hooks.callback(setattr, block, "_compiled_call_impl", compiled)
        return
    open_marks: list[Any] = []

    def begin(*_: Any) -> None:
        open_marks.append(mark(BLOCK + name))
        open_marks[-1].__enter__()

    def end(*_: Any) -> None:
        open_marks.pop().__exit__(None, None, None)

    hooks.callback(block.register_forward_pre_hook(begin).remove)
    hooks.callback(block.register_forward_hook(end, always_call=True).remove)


def _mark_gradient(hooks: ExitStack, parameter: nn.Parameter, place: str) -> None:
    if not parameter.requires_grad:
        return

    def arrived(gradient: Tensor) -> None:
        _name_gradient(gradient, place)

    hook: Any = parameter.register_hook  # torch has no types for it
    hooks.callback(hook(arrived).remove)


def _name_gradient(gradient: Tensor, place: str) -> None:
    with mark(f"{GRADIENT}{address(gradient)} {place}"):
        pass
