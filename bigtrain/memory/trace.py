"""A training step on fake tensors, which have shapes and no memory: what it would allocate and release, in order.

The order and the sizes are those of torch itself: autograd, checkpointing, hooks and optimizers really run, only the
kernels do not. What kernels for CPUs hold inside them is in `kernels.py`.
"""

from __future__ import annotations

import copy
import gc
import math
import sys
import weakref
from collections.abc import Callable, Iterable, Iterator, Sequence
from contextlib import contextmanager
from functools import cache
from itertools import zip_longest
from typing import Any, Protocol

import torch
from torch import Tensor, nn
from torch._subclasses.fake_tensor import FakeTensor, FakeTensorMode, unset_fake_temporarily
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves

from bigtrain.errors import InputError
from bigtrain.memory.kernels import corrected, dense, in_place, inner_bytes
from bigtrain.memory.record import Recording
from bigtrain.memory.report import Timeline
from bigtrain.memory.untraceable import UNTRACEABLE, explained

_FAKES = FakeTensorMode(allow_non_fake_inputs=True)
"""One for the process: fake tensors of different modes do not mix."""

REAL_ELEMENTS = 2**24
"""An operation on real tensors that may make more than so many runs on fake ones: a trace allocates next to nothing."""


@contextmanager
def fakes() -> Iterator[None]:
    """Make every tensor that is created inside a fake one. Models, batches and optimizers to trace are built here."""
    with _FAKES:
        yield


def as_fake(model: nn.Module, device: torch.device | str = "cpu") -> nn.Module:
    """Return a copy of a model with fake parameters and buffers on a device; ties, dtypes and strides stay.

    The model may be on the meta device. Nothing is allocated. Hooks on parameters and their gradients are not copied.
    """
    memo: dict[int, Any] = {}
    for tensor in _tensors_of(model):
        if id(tensor) not in memo:
            memo[id(tensor)] = fake_like(tensor, device)
    with _FAKES:
        return copy.deepcopy(model, memo)


def fake_like(tensor: Tensor, device: torch.device | str = "cpu") -> Tensor:
    """Return a fake tensor of the layout of a real, meta or fake one; a parameter of a parameter."""
    with _FAKES:
        fake = torch.empty_strided(tensor.shape, tensor.stride(), dtype=tensor.dtype, device=device)
        if not isinstance(tensor, nn.Parameter):
            return fake.requires_grad_(tensor.requires_grad)
        parameter = nn.Parameter(fake, requires_grad=tensor.requires_grad)
        if tensor.is_floating_point() and tensor.grad_dtype != tensor.dtype:
            parameter.grad_dtype = tensor.grad_dtype
        return parameter


def _tensors_of(model: nn.Module) -> Iterator[Tensor]:
    yield from model.parameters()
    yield from model.buffers()
    for module in model.modules():
        yield from (value for value in vars(module).values() if isinstance(value, Tensor) and not value.requires_grad)


def trace(run: Callable[[], object], *, condition: bool | None = None) -> Timeline:
    """Return what a call would allocate and release on fake tensors, on the CPU as `measure` measures the real call.

    `run` uses a model and an optimizer that were built inside `fakes()` or come from `as_fake`; other tensors may be
    real, and operations on real tensors alone really run, so that lengths can be read. `condition` is what a condition
    on a number that does not exist counts as, such as `if loss.isfinite()`. Raises InputError naming operation and
    module where the call reads such a number, or where a shape depends on it.
    """
    counting = Counting(condition)
    gc.collect()
    with counting.running():
        run()
    return Timeline(tuple(counting.timeline))


class Clock(Protocol):
    """Who says how long operations take, from their names, arguments and what they read and make."""

    def tick(self, operator: Any, args: Sequence[Any], given: Sequence[Tensor], made: Sequence[Tensor]) -> None:
        """Add the time of an operation."""

    def read(self) -> float:
        """Return the seconds since the last reading, and begin again."""


def seconds_of(clock: Clock | None) -> float:
    """Return what a clock shows since the last reading, nothing without one."""
    return 0.0 if clock is None else clock.read()


class Counting(TorchDispatchMode):  # type: ignore[no-untyped-call]
    """Count the storages that are alive: each from the operation that first returns it until its memory is released.

    With a `recording` each is noted there too, with where it is made as `where` tells it; see `recorded_as`. A `clock`
    is shown every operation.
    """

    def __init__(
        self,
        condition: bool | None = None,
        recording: Recording | None = None,
        where: Callable[[], str] = str,
        clock: Clock | None = None,
    ) -> None:
        super().__init__()  # type: ignore[no-untyped-call]
        self.live = 0
        self.timeline: list[int] = []
        self._condition, self._recording, self._where, self._clock = condition, recording, where, clock
        self._numbers: dict[int, int] = {}
        self._known: dict[int, weakref.ref[Any]] = {}

    @contextmanager
    def running(self) -> Iterator[None]:
        """Count what runs inside, on fake tensors."""
        _unshared()
        try:
            with _FAKES, _random_states(self), self:
                yield
        except UNTRACEABLE as error:
            raise InputError(explained(error)) from error

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        """Run an operation and count what it returns."""
        if func is torch.ops.aten.add.Tensor and _accumulates() and holders(args) == _unshared() and dense(args[0]):
            return args[0].add_(args[1])
        kwargs = kwargs or {}
        given = [leaf for leaf in tree_leaves((args, kwargs)) if isinstance(leaf, Tensor)]
        if func is not torch.ops.aten.lift_fresh.default:  # whose numbers were never there before
            for tensor in given:
                self.see(tensor, new=False)
        if _runs_really(func, given):
            with unset_fake_temporarily():
                out = func(*args, **kwargs)
        elif func is torch.ops.aten._local_scalar_dense.default and args[0].dtype == torch.bool:
            return func(*args, **kwargs) if self._condition is None else self._condition
        else:
            func = in_place(func, _node()) or func if _in_backward() else func
            out = corrected(func._schema.name, args, func(*args, **kwargs))
        made = [leaf for leaf in tree_leaves(out) if isinstance(leaf, Tensor)]
        if self._clock is not None:
            self._clock.tick(func, args, given, made)
        del given
        for tensor in made:
            self.see(tensor, new=True)
        if made and made[0].device.type == "cpu":
            self._pass(inner_bytes(func._schema.name, args, kwargs, out))
        return out

    def see(self, tensor: Tensor, *, new: bool) -> None:
        """Follow a tensor's memory from now on; what is not new was there before, and counts when it is released."""
        storage = tensor.untyped_storage()
        key = storage._cdata
        if key in self._known or tensor.device.type == "meta":
            return
        size = storage.nbytes()
        self._known[key] = weakref.ref(storage, lambda _: self._drop(key, size))
        if new:
            self._add(size)
            if self._recording is not None:
                self._numbers[key] = self._recording.allocate(size, _cause(self._recording.phase), self._where())

    def recorded_as(self, tensors: Iterable[Tensor], cause: str, place: str = "") -> None:
        """Say in the recording what the memory of some tensors is for, and where, from when it was allocated."""
        assert self._recording is not None
        for tensor in tensors:
            number = self._numbers.get(tensor.untyped_storage()._cdata)
            if number is not None:
                self._recording.causes[number], self._recording.places[number] = cause, place

    def _drop(self, key: int, size: int) -> None:
        del self._known[key]
        self._add(-size)
        if key in self._numbers:
            assert self._recording is not None
            self._recording.release(self._numbers.pop(key))

    def _add(self, size: int) -> None:
        self.live += size
        self.timeline.append(self.live)

    def _pass(self, size: int) -> None:
        if not size:
            return
        self._add(size)
        self._add(-size)
        if self._recording is not None:
            self._recording.release(self._recording.allocate(size, "temporaries", self._where()))


def _runs_really(func: Any, given: Sequence[Tensor]) -> bool:
    """Tell whether an operation has numbers: of real tensors, unless it may make a large one, or positions in a row.

    Models look at positions and masks to see whether attention needs a mask; transformers takes a fake one for a model
    that is being exported, and then does other things than in training.
    """
    if not given:
        return func in _POSITIONS
    return not any(isinstance(tensor, FakeTensor) for tensor in given) and _most_elements(given) <= REAL_ELEMENTS


def _most_elements(given: Sequence[Tensor]) -> int:
    """Return how many elements tensors have together at most, one broadcast over the other."""
    dims = zip_longest(*(reversed(tensor.shape) for tensor in given), fillvalue=1)
    return math.prod(max(sizes) for sizes in dims)


_POSITIONS = (torch.ops.aten.arange.default, torch.ops.aten.arange.start, torch.ops.aten.arange.start_step)


def _cause(phase: str) -> str:
    """Return what memory is for until more is known: a backward pass records a graph only where it recomputes."""
    kept = phase == "forward" or (phase == "backward" and torch.is_grad_enabled())
    return "activations" if kept else "temporaries"


def holders(args: tuple[Any, ...]) -> tuple[int, int, int]:
    """Return how many hold the first argument: the tensor, its memory, its Python object."""
    first = args[0]
    memory = torch._C._storage_Use_Count(first.untyped_storage()._cdata)
    return first._use_count(), memory, sys.getrefcount(first)


class _Probe(TorchDispatchMode):  # type: ignore[no-untyped-call]
    """Find out how many hold a gradient, seen from an operation, that nobody but autograd's buffer holds."""

    found: tuple[int, int, int] | None = None

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        if func is torch.ops.aten.add.Tensor and _accumulates():
            self.found = holders(args)
        return func(*args, **(kwargs or {}))


@cache
def _unshared() -> tuple[int, int, int]:
    """Return `holders` of a gradient that autograd adds to in place; with a dispatch mode it always makes a new one."""
    with _FAKES:
        leaf = torch.empty(2, requires_grad=True)
    with _FAKES, _Probe() as probe:  # type: ignore[no-untyped-call]
        x = leaf * 2
        torch.autograd.backward((x.sin() * x.exp()).square().sum())
    assert isinstance(probe, _Probe) and probe.found is not None
    return probe.found


def _in_backward() -> bool:
    return bool(torch._C._current_graph_task_id() != -1)


def _accumulates() -> bool:
    """Tell whether autograd itself calls, from C++ and without recording: it then adds up gradients of one tensor."""
    if not _in_backward() or torch.is_grad_enabled():
        return False
    caller = sys._getframe(2)
    while caller.f_back is not None and caller.f_code.co_filename.endswith(_WRAPPERS):
        caller = caller.f_back
    return caller.f_code.co_name == "_engine_run_backward"


_WRAPPERS = ("torch/_compile.py", "torch/_dynamo/eval_frame.py")
"""What torch puts around the code of a dispatch mode."""


def _node() -> str:
    node: Any = torch._C._current_autograd_node()
    return "" if node is None else str(node.name())


@contextmanager
def _random_states(counting: Counting) -> Iterator[None]:
    """Count the copies of the generator's state that recomputation keeps; they are made outside of torch's dispatch."""
    plain = torch.random.get_rng_state

    def counted() -> Tensor:
        state = plain()
        counting.see(state, new=True)
        return state

    torch.get_rng_state = torch.random.get_rng_state = counted
    try:
        yield
    finally:
        torch.get_rng_state = torch.random.get_rng_state = plain
