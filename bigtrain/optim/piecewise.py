"""What the optimizers here share: states in few bits, weights in their format, work in pieces, skipped steps."""

from __future__ import annotations

import math
from collections.abc import Callable, Iterable, Iterator, Sequence
from contextlib import contextmanager
from itertools import repeat
from typing import Any, NamedTuple

import torch
from torch import Tensor
from torch.optim import Optimizer

from bigtrain.errors import InputError
from bigtrain.optim.cost import STATES, check_known, piece_elements
from bigtrain.optim.pieces import WINDOW_STRIDE, Views, Window, Workspace, split
from bigtrain.optim.quantize import Codec, State, codec_for
from bigtrain.optim.weights import check_dtype, weight_format

Group = dict[str, Any]


class Piece(NamedTuple):
    """Views of some elements of a parameter: its gradient, its weights, its moments; and their noise window."""

    flat_gradient: Tensor
    weight: Views
    moments: tuple[Views, ...]
    window: Window

    @property
    def size(self) -> int:
        return len(self.flat_gradient)

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
    """

    found_inf: Tensor | None

    def __init__(self, params: Iterable[Any], defaults: Group, *, state: str, master_weights: str) -> None:
        check_known("optimizer.state", state, STATES)
        _check_numbers(defaults)
        self.found_inf = None
        self.state_format = state
        self.weights = weight_format(master_weights)
        self._master_weights = master_weights
        self._groups: dict[Tensor, int] = {}
        self._workspaces: dict[torch.device, Workspace] = {}
        # `fused`: whoever loads a state puts the step counts where the parameters are.
        super().__init__(params, {**defaults, "fused": True})

    def add_param_group(self, param_group: Group) -> None:
        """Add parameters. Raises InputError for a dtype that is not the one of the master weights."""
        super().add_param_group(param_group)
        self._workspaces.clear()
        index = len(self.param_groups) - 1
        for parameter in self.param_groups[index]["params"]:
            check_dtype(parameter, self._master_weights)
            self._groups[parameter] = index

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
        return loss

    @torch.no_grad()
    def update(self, parameter: Tensor) -> None:
        """Update one parameter from its gradient, exactly as `step` would."""
        if not self._is_skipped():
            self._step_all([parameter], self.param_groups[self._groups[parameter]])

    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        """Load a state, each tensor in its own dtype: torch's version casts all of them to the parameter's."""
        super().load_state_dict(state_dict)
        saved = [index for group in state_dict["param_groups"] for index in group["params"]]
        held = [parameter for group in self.param_groups for parameter in group["params"]]
        for index, parameter in zip(saved, held, strict=True):
            for key, value in state_dict["state"].get(index, {}).items():
                if isinstance(value, Tensor):
                    self.state[parameter][key] = value.to(parameter.device).clone()

    def _step_all(self, parameters: list[Tensor], group: Group) -> None:
        for parameter in parameters:
            _check_contiguous(parameter)
            state = self._state_of(parameter, group)
            state["step"] += 1
            if parameter.numel():
                self._step_one(parameter, state, group)
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
        if not state:
            state["step"] = torch.zeros((), dtype=torch.float32, device=parameter.device)
            state.update(self._new_state(parameter, group))
            state.update(self.weights.allocate(parameter))
        return state

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
        """Undo what happens to these tensors where `found_inf` is 1, without asking for its value."""
        if self.found_inf is None or self._is_readable(self.found_inf):
            yield
            return
        kept = [(tensor, tensor.clone()) for tensor in touched]
        yield
        skipped = self.found_inf.bool()
        for tensor, before in kept:
            tensor.copy_(torch.where(skipped, before, tensor))

    def _work(self, parameter: Tensor) -> Workspace:
        if parameter.device not in self._workspaces:
            elements = self._piece_elements(parameter.device.type)
            self._workspaces[parameter.device] = Workspace(parameter.device, elements)
        return self._workspaces[parameter.device]

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
            yield Piece(gradient, weight, views, window)
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
