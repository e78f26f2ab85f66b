"""What the optimizers here share: states in few bits, weights in their format, work in pieces, skipped steps."""

from __future__ import annotations

import inspect
import math
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from functools import cached_property
from itertools import repeat
from typing import Any, ClassVar

import torch
from torch import Tensor
from torch.optim import Optimizer

from bigtrain.errors import InputError
from bigtrain.optim.cost import STATES, check_known, piece_elements
from bigtrain.optim.exchange import Exchange
from bigtrain.optim.pieces import WINDOW_STRIDE, Views, Window, Workspace, split
from bigtrain.optim.quantize import Codec, State, codec_for
from bigtrain.optim.staging import Staging
from bigtrain.optim.weights import check_dtype, weight_format

Group = dict[str, Any]


class Piece:
    """Views of some elements of a parameter: its gradient, its weights, its moments; and their noise window.

    With `staging`, those on the host visit the device from when they are first asked for.
    """

    def __init__(
        self, gradient: Tensor, weight: Views, moments: tuple[Views, ...], window: Window, staging: Staging | None
    ) -> None:
        self._gradient, self._weight, self._moments = gradient, weight, moments
        self.window, self._staging = window, staging
        self.size = len(gradient)
        if staging is not None:
            first = [gradient, weight[0]] if staging.everything else []
            staging.begin([*first, *weight[1:], *(view for views in moments for view in views)])

    @cached_property
    def flat_gradient(self) -> Tensor:
        if self._staging is None or not self._staging.everything:
            return self._gradient
        return self._staging.fetch((self._gradient,))[0]

    @cached_property
    def weight(self) -> Views:
        if self._staging is None:
            return self._weight
        here = 0 if self._staging.everything else 1  # the first is the parameter itself, the rest is of the state
        return *self._weight[:here], *self._staging.fetch(self._weight[here:])

    @cached_property
    def moments(self) -> tuple[Views, ...]:
        if self._staging is None:
            return self._moments
        return tuple(map(self._staging.fetch, self._moments))

    def gradient(self, work: Workspace) -> Tensor:
        """Return the gradient as fp32, not to be changed: a view, or the work buffer `gradient`."""
        if self.flat_gradient.dtype == torch.float32:
            return self.flat_gradient
        return work.floats("gradient", self.size).copy_(self.flat_gradient)


class Piecewise(Optimizer):
    """An optimizer that updates one parameter at a time, in fp32, a piece of bounded size after another.

    `found_inf` is None or a 0-dim float tensor. Where it is 1, a step changes no weight, no state and no counter, bit
    for bit; on a GPU nothing waits for its value. Parameters and gradients must be contiguous; gradients may have any
    floating-point dtype.

    Parameters may be rows of larger ones, whose other rows are on other ranks: `exchange` is then what those tell each
    other, and a step is a collective call, with the same parameters, the same gradients present and the same
    `found_inf` on all of them.
    """

    elementwise: ClassVar[bool] = False
    """Whether the update of an element depends on no other, so that rows are updated alone."""

    whole_keys: ClassVar[tuple[str, ...]] = ("step",)
    """Keys of the state that are the same on all ranks which have rows of a parameter."""

    row_keys: ClassVar[tuple[str, ...]] = ()
    """Keys of the state that hold a number for each row of a parameter."""

    found_inf: Tensor | None
    exchange: Exchange | None
    staging: Staging | None
    """Where what is on the host visits the device; set before the first step, by `offload.keep_on_host`."""

    resident: ClassVar[tuple[str, ...]] = ("step",)
    """What of a state stays on the device in any case: numbers, or rows and columns."""

    def __init__(self, params: Iterable[Any], defaults: Group, *, state: str, master_weights: str) -> None:
        check_known("optimizer.state", state, STATES)
        _check_numbers(defaults)
        self.found_inf = self.exchange = self.staging = None
        self.state_format = state
        self.weights = weight_format(master_weights)
        self._master_weights = master_weights
        self._groups: dict[Tensor, int] = {}
        self._workspaces: dict[torch.device, Workspace] = {}
        # `fused`: whoever loads a state puts the step counts where the parameters are.
        super().__init__(params, {**defaults, "fused": True})

    def add_param_group(self, param_group: Group) -> None:
        """Add parameters. Raises InputError for a dtype that is not the one of the master weights."""
        # Unwrapped: the wrapper loads torch's compiler, 70 MB of resident memory, to keep it out of here.
        inspect.unwrap(Optimizer.add_param_group)(self, param_group)
        self._workspaces.clear()
        index = len(self.param_groups) - 1
        for parameter in self.param_groups[index]["params"]:
            check_dtype(parameter, self._master_weights)
            self._groups[parameter] = index

    def zero_grad(self, set_to_none: bool = True) -> None:
        """Clear every gradient, as torch's own does, which would load the compiler too."""
        inspect.unwrap(Optimizer.zero_grad)(self, set_to_none)

    @torch.no_grad()
    def step(self, closure: Callable[[], float] | None = None) -> float | None:  # type: ignore[override]
        """Update every parameter that has a gradient; return what the closure returns."""
        loss = None
        if closure is not None:
            with torch.enable_grad():
                loss = closure()
        if not self._is_skipped():
            for group in self.param_groups:
                self._step_all([p for p in group["params"] if p.grad is not None], group)
            self._close()
        return loss

    @torch.no_grad()
    def update(self, parameter: Tensor) -> None:
        """Update one parameter from its gradient, exactly as `step` would."""
        if not self._is_skipped():
            self._step_all([parameter], self.param_groups[self._groups[parameter]])
            self._close()

    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        """Load a state, each tensor in its own dtype and to where such states are.

        torch's version casts all of them to the parameter's dtype, on its device.
        """
        super().load_state_dict({**state_dict, "state": {}})
        saved = [index for group in state_dict["param_groups"] for index in group["params"]]
        held = [parameter for group in self.param_groups for parameter in group["params"]]
        for index, parameter in zip(saved, held, strict=True):
            self.take_state(parameter, state_dict["state"].get(index, {}))

    def take_state(self, parameter: Tensor, state: Mapping[str, Any]) -> None:
        """Take over a copy of a parameter's state, each tensor to where such states are."""
        self.state[parameter].update(self._placed(state, parameter))

    def _step_all(self, parameters: list[Tensor], group: Group) -> None:
        for parameter in parameters:
            state = self._begin(parameter, group)
            if parameter.numel():
                self._step_one(parameter, state, group)
            self._end(state)

    def _begin(self, parameter: Tensor, group: Group) -> State:
        """Return the state of a parameter with this step counted."""
        _check_contiguous(parameter)
        state = self._state_of(parameter, group)
        state["step"] += 1
        return state

    def _end(self, state: State) -> None:
        """Take the count back where the step is left out."""
        if self.found_inf is not None:
            state["step"] -= self.found_inf

    def _step_one(self, parameter: Tensor, state: State, group: Group) -> None:
        """Change a parameter and its state, whose step count is already this step's."""
        raise TypeError(f"{type(self).__name__} has no step of its own")

    def _new_state(self, parameter: Tensor, group: Group) -> State:
        """Return what the state of a parameter holds besides the step count and the weight's part."""
        raise TypeError(f"{type(self).__name__} has no state of its own")

    def _state_of(self, parameter: Tensor, group: Group) -> State:
        state: State = self.state[parameter]
        if "step" not in state:
            device = self._device(parameter)
            like = parameter if self.staging is None else torch.empty_like(parameter, device="meta")
            made = {**self._new_state(like, group), **self.weights.allocate(like)}
            state["step"] = torch.zeros((), dtype=torch.float32, device=device)
            state.update(made if self.staging is None else self.staging.zeros(made, self.resident))
        return state

    def _placed(self, state: Mapping[str, Any], parameter: Tensor) -> dict[str, Any]:
        """Return a copy of a state where it belongs: on the parameter's device, or with offload on the host."""
        if self.staging is not None:
            return self.staging.placed(state, self.resident)
        tensors = {key: value for key, value in state.items() if isinstance(value, Tensor)}
        return {**state, **{key: value.to(parameter.device, copy=True) for key, value in tensors.items()}}

    def _device(self, parameter: Tensor) -> torch.device:
        """Return where a parameter is updated."""
        return parameter.device if self.staging is None else self.staging.device

    def _close(self) -> None:
        if self.staging is not None:
            self.staging.close()

    def moments(self, parameter: Tensor) -> dict[str, str]:
        """Return the keys of the moments that are kept in `state_format`, with what `codec_for` calls their use."""
        return {"exp_avg": "first", "exp_avg_sq": "second"}

    def _codec(self, key: str, use: str, parameter: Tensor) -> Codec:
        return codec_for(key, use, self.state_format, parameter.numel())

    def _moments(self, parameter: Tensor) -> tuple[Codec, Codec]:
        return self._codec("exp_avg", "first", parameter), self._codec("exp_avg_sq", "second", parameter)

    def _is_skipped(self) -> bool:
        """Tell whether the step is known, without waiting for a device, to be one that changes nothing."""
        return self.found_inf is not None and self._is_readable(self.found_inf) and bool(self.found_inf)

    @staticmethod
    def _is_readable(found_inf: Tensor) -> bool:
        return found_inf.device.type == "cpu"

    @contextmanager
    def _restored(self, touched: Iterable[Tensor]) -> Iterator[None]:
        """Undo what happens to these tensors where `found_inf` is 1, without asking for its value.

        Those that visit the device are then sent back: whatever changes a weight or a state does it in here.
        """
        touched = list(touched)
        if self.found_inf is None or self._is_readable(self.found_inf):
            yield
        else:
            kept = [(tensor, tensor.clone()) for tensor in touched]
            yield
            skipped = self.found_inf.bool()
            for tensor, before in kept:
                tensor.copy_(torch.where(skipped, before, tensor))
        if self.staging is not None:
            self.staging.send(touched)

    def _work(self, parameter: Tensor) -> Workspace:
        device = self._device(parameter)
        if device not in self._workspaces:
            self._workspaces[device] = Workspace(device, self._piece_elements(device.type))
        return self._workspaces[device]

    def _piece_elements(self, device: str) -> int:
        return piece_elements(device, (p.shape for group in self.param_groups for p in group["params"]))

    def _pieces(
        self, parameter: Tensor, state: State, codecs: Sequence[Codec], work: Workspace, elements: int | None = None
    ) -> Iterator[Piece]:
        """Yield what a step reads and writes, a piece after another, of `work.elements` unless told otherwise."""
        assert parameter.grad is not None
        elements = elements or work.elements
        gradients = split(parameter.grad.contiguous(), elements)
        weights = self.weights.split(parameter, state, elements)
        moments = zip(*(codec.split(state, elements) for codec in codecs), strict=True) if codecs else repeat(())
        window = work.window(state["step"])
        for gradient, weight, views in zip(gradients, weights, moments, strict=bool(codecs)):
            yield Piece(gradient, weight, views, window, self.staging)
            window = window + WINDOW_STRIDE


def _check_numbers(defaults: Group) -> None:
    """Raise InputError for a rate, an epsilon or a decay below 0, and for betas that are not from 0 up to below 1."""
    for key in ("lr", "eps", "weight_decay"):
        if not defaults.get(key, 0) >= 0:
            raise InputError(f"{key}={defaults[key]} is below 0; use 0 or more")
    betas = defaults.get("betas", ())
    if not all(0 <= beta < 1 for beta in betas):
        raise InputError(f"betas={betas} must be from 0 up to, not including, 1; the defaults are (0.9, 0.999)")


def _check_contiguous(parameter: Tensor) -> None:
    if not parameter.is_contiguous():
        raise InputError(
            f"a parameter of shape {tuple(parameter.shape)} and strides {parameter.stride()} is not contiguous; "
            "make it so before the optimizer is made (parameter.data = parameter.data.contiguous())"
        )


def bias_corrections(step: Tensor, betas: tuple[float, float]) -> tuple[Tensor, Tensor]:
    """Return 1 - beta**step for both moments, as 0-dim fp64 tensors on the step's device."""
    count = step.double()
    first, second = (1 - torch.pow(torch.full_like(count, beta), count) for beta in betas)
    return first, second


def rms_scale(rows: int, columns: int) -> float:
    """Return 0.2 * sqrt(max(rows, columns)), which gives Muon's update AdamW's usual size (arXiv 2502.16982, eq. 4)."""
    return 0.2 * math.sqrt(max(rows, columns))
