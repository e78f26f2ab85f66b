"""A model onto its device, built there and initialised if it was on the meta device; which of its modules repeat."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from functools import partial
from inspect import Parameter, signature
from typing import Any

import torch
from torch import Tensor, nn
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves

from bigtrain.errors import InputError

Keep = Callable[[nn.Parameter], object]
Cut = Callable[[str, Tensor], Tensor]


def place(
    model: nn.Module, device: torch.device, *, seed: int, keep: Keep | None = None, cut: Cut | None = None
) -> dict[str, Tensor]:
    """Move a model to a device; parameters on the meta device are created there and initialised from the seed.

    Modules are initialised by their `reset_parameters`, by the `_init_weights` of a transformers model, or all by an
    `init_weights()` of the model's own, as in torchtitan, for which the model is whole for a moment. `keep` is given
    each parameter once nothing initialises it any more: where it rounds, the model is never whole in the dtype
    that it is initialised in. The weights do not depend on it, but for its rounding.

    With `cut` a parameter that was created goes back to the meta device after that, and what `cut` makes of its name
    and its numbers is returned by name: the model is never whole on the device. Nothing is cut of a model that was not
    on the meta device.
    Raises InputError naming the first module that has parameters or buffers and none of these, or the first tensor that
    `init_weights()` leaves out.
    """
    tensors = [*model.parameters(), *model.buffers()]
    if not any(tensor.is_meta for tensor in tensors):
        if not all(_stands_on(tensor, device) for tensor in tensors):  # fake tensors cannot be moved, nor need they
            if keep is not None:  # before they move: rounded ones take less of the device
                for parameter in model.parameters():
                    keep(parameter)
            model.to(device)
        return {}
    if not all(tensor.is_meta for tensor in tensors):
        raise InputError("the model is partly on the meta device; build all of it there, or all on a real device")
    creation = _Creation(model, device, keep, cut)
    creation.run(seed)
    return creation.cut


def _stands_on(tensor: Tensor, device: torch.device) -> bool:
    return tensor.device.type == device.type and device.index in (None, tensor.device.index)


class _Creation:
    """A model on the meta device, each tensor of which is created when a module first initialises it.

    Which modules that are, beside those that hold it, is found by initialising on the meta device, where that does
    nothing else: some modules initialise weights of those below them, or scale them.
    """

    def __init__(self, model: nn.Module, device: torch.device, keep: Keep | None, cut: Cut | None) -> None:
        self._model, self._device, self._keep, self._cut = model, device, keep, cut
        self._names = {id(parameter): name for name, parameter in model.named_parameters()}
        self.cut: dict[str, Tensor] = {}
        self._tensors: dict[int, Tensor] = {}
        self._places: dict[int, list[tuple[nn.Module, str]]] = {}
        """Where each stands: in several places if it is tied."""
        for module in model.modules():
            for name, tensor in _own(module):
                self._tensors[id(tensor)] = tensor
                self._places.setdefault(id(tensor), []).append((module, name))

    def run(self, seed: int) -> None:
        """Create and initialise everything."""
        if whole := _initialiser_of_all(self._model):
            torch.manual_seed(seed)
            self._run_whole(whole)
            return
        calls = list(_initialisers(self._model))
        needs = [self._needs(module, initialise) for module, initialise in calls]
        last = {key: number for number, keys in enumerate(needs) for key in keys}
        made: dict[int, Tensor] = {}
        torch.manual_seed(seed)
        for number, (_, initialise) in enumerate(calls):
            made |= {key: self._create(key) for key in needs[number] if key not in made}
            initialise()
            for key in (key for key in needs[number] if last[key] == number):
                self._finish(key, made)

    def _finish(self, key: int, made: dict[int, Tensor]) -> None:
        """Round and cut a parameter that nothing initialises any more; a buffer stays as it is."""
        parameter = made[key]
        if not isinstance(parameter, nn.Parameter):
            return
        if self._keep is not None:
            self._keep(parameter)
        if self._cut is not None:
            name = self._names[key]
            self.cut[name] = self._cut(name, parameter.detach())
            del made[key]
            self._put(key, nn.Parameter(torch.empty_like(parameter, device="meta"), parameter.requires_grad))

    def _needs(self, module: nn.Module, initialise: Callable[[], object]) -> list[int]:
        """Return which tensors a module holds or initialises; for one that reads numbers, all that are below it."""
        met = _Met()
        try:
            with torch.device("meta"), met:
                initialise()
        except (RuntimeError, TypeError):  # what torch raises where numbers of a meta tensor are asked for
            met.memories.update(_memory(tensor) for below in module.modules() for _, tensor in _own(below))
        own = {id(tensor) for _, tensor in _own(module)}
        return [key for key, tensor in self._tensors.items() if key in own or _memory(tensor) in met.memories]

    def _run_whole(self, initialise: Callable[[], object]) -> None:
        """Create all tensors and have them initialised; a buffer may also be replaced."""
        made = {key: self._create(key) for key in self._tensors}
        met = _Met()
        with self._device, met:
            initialise()
        for key, tensor in list(made.items()):
            module, name = self._places[key][0]
            if getattr(module, name) is tensor and _memory(tensor) not in met.memories:
                of_whom = f"{name} of a {type(module).__name__}"
                raise InputError(
                    f"{of_whom} is on the meta device, and init_weights() leaves it out; initialise it there"
                )
            self._finish(key, made)

    def _create(self, key: int) -> Tensor:
        tensor = self._tensors[key]
        empty = _empty(tensor, self._device)
        made = nn.Parameter(empty, tensor.requires_grad) if isinstance(tensor, nn.Parameter) else empty
        self._put(key, made)
        return made

    def _put(self, key: int, tensor: Tensor) -> None:
        for module, name in self._places[key]:
            setattr(module, name, tensor)


class _Met(TorchDispatchMode):  # type: ignore[no-untyped-call]
    """Note the memory of all tensors that operations meet."""

    def __init__(self) -> None:
        super().__init__()  # type: ignore[no-untyped-call]
        self.memories: set[int] = set()

    @classmethod
    def _should_skip_dynamo(cls) -> bool:
        """Do not load torch's compiler, 70 MB of resident memory, to be left alone by it: nothing compiles here."""
        return False

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        """Run an operation."""
        kwargs = kwargs or {}
        self.memories.update(_memory(leaf) for leaf in tree_leaves((args, kwargs)) if isinstance(leaf, Tensor))
        return func(*args, **kwargs)


def _empty(tensor: Tensor, device: torch.device) -> Tensor:
    """Return memory of a meta tensor's layout."""
    if tensor.is_contiguous():  # or torch would load a symbolic algebra for it, 30 MB of resident memory
        return torch.empty(tensor.shape, dtype=tensor.dtype, device=device)
    return torch.empty_like(tensor, device=device, requires_grad=False)


def _memory(tensor: Tensor) -> int:
    return int(tensor.untyped_storage()._cdata)


def _own(module: nn.Module) -> list[tuple[str, Tensor]]:
    """Return a module's own parameters and buffers with their names."""
    return [(name, t) for name, t in [*module._parameters.items(), *module._buffers.items()] if t is not None]


def _initialiser_of_all(model: nn.Module) -> Callable[[], object] | None:
    """Return a method of a model's own, not of transformers', that initialises all of it and needs no arguments."""
    its_own: Any = getattr(model, "init_weights", None)
    if not callable(its_own) or callable(getattr(model, "_init_weights", None)):
        return None
    needed = [p for p in signature(its_own).parameters.values() if p.default is p.empty and p.kind not in _ANY]
    return None if needed else its_own


_ANY = (Parameter.VAR_POSITIONAL, Parameter.VAR_KEYWORD)


def _initialisers(model: nn.Module) -> Iterator[tuple[nn.Module, Callable[[], object]]]:
    """Yield what initialises each module, in the order in which they take random numbers."""
    of_transformers: Any = getattr(model, "_init_weights", None)
    if callable(of_transformers):
        modules: list[nn.Module] = []
        model.apply(modules.append)  # children first: a parent scales some of its children's weights afterwards
        for module in modules:
            yield module, partial(of_transformers, module)
        return
    for name, module in model.named_modules():
        its_own: Any = getattr(module, "reset_parameters", None)
        if callable(its_own):
            yield module, its_own
        elif _own(module):
            raise InputError(
                f"{name or 'the model'}: {type(module).__name__} is on the meta device and has no reset_parameters(); "
                "add one, or build the model on a real device"
            )


def find_blocks(model: nn.Module, blocks: type[nn.Module] | Sequence[nn.Module] | None = None) -> list[nn.Module]:
    """Return a model's repeated blocks: those given, all modules of a class, or the members of its longest ModuleList.

    A ModuleDict whose members are all of one class counts as such a list.
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
        lists = [members for module in model.modules() for members in _members(module)]
        found = max(lists, key=len, default=[])
    if not found:
        wanted = f"module of class {blocks.__name__}" if isinstance(blocks, type) else "ModuleList of blocks"
        raise InputError(f"{type(model).__name__}: has no {wanted}; name the class of its blocks with blocks=...")
    return found


def _members(module: nn.Module) -> Iterator[list[nn.Module]]:
    """Yield what a module holds in a row, if it does."""
    if isinstance(module, nn.ModuleList):
        yield list(module)
    elif isinstance(module, nn.ModuleDict) and len({type(member) for member in module.values()}) == 1:
        yield list(module.values())
