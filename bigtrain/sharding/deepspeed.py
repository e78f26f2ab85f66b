"""From a model to one that DeepSpeed trains, with the face of `apply.Sharded`: ZeRO 1 to 3, host memory and NVMe.

DeepSpeed cuts flat parameters anywhere. Checkpoints have rows, as those of `fully_shard`: `laid_out` turns one into the
other, tensor by tensor.
"""

from __future__ import annotations

import os
import warnings
from collections.abc import Callable, Iterable, Iterator, Mapping
from contextlib import contextmanager, redirect_stdout
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor, nn
from torch._C._distributed_c10d import HashStore
from torch.optim import Optimizer

from bigtrain.errors import InputError
from bigtrain.sharding.entered import enter
from bigtrain.sharding.rows import join_rows, rows_of, take_rows

UNUSED_KERNELS = "deepspeed_shm_comm"
"""Compiled for 60 to 90 s at the first start on a CPU, for inference alone."""

RENAMED = r"`torch\.distributed\.\w+` is deprecated"
"""What torch 2.13 says of the collectives that DeepSpeed calls, each time that it does."""

Factory = Callable[[Iterable[nn.Parameter]], Optimizer]


class DeepSpeed:
    """A model in DeepSpeed's hands.

    `optimizer` is the one it was given: DeepSpeed lets it update flat parts of its own, so that `param_groups` tell the
    learning rate and `state` is by those. `parts` are the rows of each parameter that this rank has in a checkpoint.
    """

    replicate = 1

    def __init__(self, model: nn.Module, engine: Any, optimizer: Optimizer) -> None:
        self.model, self.optimizer = model, optimizer
        self.shards, self.shard_rank = dist.get_world_size(), dist.get_rank()
        self._engine, self._zero = engine, engine.optimizer
        self._whole = dict(model.named_parameters())
        shapes = {name: tuple(getattr(p, "ds_shape", p.shape)) for name, p in self._whole.items()}
        self.parts = {name: rows_of(shape, self.shard_rank, self.shards) for name, shape in shapes.items()}
        self._rows: dict[str, nn.Parameter] | None = None

    @property
    def parameters(self) -> dict[str, nn.Parameter]:
        """Return the rows of `parts`, fp32 in host memory; they are there inside of `laid_out` alone."""
        assert self._rows is not None, "the parameters of DeepSpeed are in its own layout outside of laid_out"
        return self._rows

    def before_micro_batch(self, *, last: bool) -> None:
        """Say, before each forward pass, whether it is the last one of an optimizer step."""
        self._engine.set_gradient_accumulation_boundary(last)

    def backward(self, loss: Tensor, scale: float | None = None) -> None:
        """Add a micro-batch's gradients, averaged over ranks and not over micro-batches; `scale` is fp16's loss scale.

        Those of a loss that is not finite are made so, on whichever rank it is: then no rank takes the step.
        """
        if scale is not None:
            self._zero.override_loss_scale(scale)
        sound = torch.where(torch.isfinite(loss.detach()), 1.0, torch.nan)
        self._engine.backward(loss * sound, scale_wrt_gas=False)

    def step(self, max_norm: float | None) -> tuple[Tensor, Tensor]:
        """Clip and update; return the global norm before clipping (fp32), and whether the weights were updated."""
        self._zero.clip_grad = max_norm or 0.0
        self._engine.step()
        device = self._engine.device
        norm = torch.as_tensor(self._engine.get_global_grad_norm(), dtype=torch.float32, device=device)
        return norm.reshape(()), torch.tensor(self._engine.was_step_applied(), device=device)

    @contextmanager
    def laid_out(self, *, changed: bool = False) -> Iterator[None]:
        """Have the rows of `parts` in `parameters`, and the optimizer's states of them in `optimizer.state`.

        What is there at the end becomes what DeepSpeed has, if it was `changed`. All ranks do this together; one tensor
        is whole at a time. Raises InputError for states whose step counts differ: DeepSpeed has one for all.
        """
        state: Any = self.optimizer.state
        counts, moments = self._state_keys()
        if moments:
            self._link_states()
        self._rows = {}
        for name, parameter in self._whole.items():
            part, trained = self.parts[name], parameter.requires_grad
            rows = nn.Parameter(take_rows(self._full(parameter), part), requires_grad=trained)
            self._rows[name] = rows
            if moments and trained:
                state[rows] = {key: value.clone() for key, value in counts.items()}
                state[rows] |= {key: take_rows(self._full(parameter, key), part) for key in moments}
        try:
            yield
            if changed:
                self._take_over()
        finally:
            for rows in self._rows.values():
                state.pop(rows, None)
            self._rows = None

    def _take_over(self) -> None:
        state: Any = self.optimizer.state
        held = {name: state[rows] for name, rows in self.parameters.items() if state.get(rows)}
        _check_counts(held)
        self._make_states(next(iter(held.values()), {}))
        moments = self._state_keys()[1] if held else []
        for name, parameter in self._whole.items():
            rows = self.parameters[name].detach()
            self._set(parameter, self._join(name, rows))
            for key in moments if parameter.requires_grad else []:
                value = held[name][key] if name in held else torch.zeros_like(rows)
                self._set(parameter, self._join(name, value), key)
        if not self._gathered:
            self._zero.update_lp_params()

    def _make_states(self, like: Mapping[str, Tensor]) -> None:
        """Give the flat parts states of the kind that a parameter has, or none."""
        state: Any = self.optimizer.state
        counts = {key: value for key, value in like.items() if not value.ndim}
        for flat in self._flats:
            if not like:
                state.pop(flat, None)
                continue
            new = state.setdefault(flat, {})
            new |= {key: value.to(flat.device, copy=True) for key, value in counts.items()}
            new |= {key: new.get(key, torch.zeros_like(flat)) for key in like if key not in counts}
        if like:
            self._link_states()

    def _link_states(self) -> None:
        """Let DeepSpeed know the states of its flat parts.

        It looks once, after the first step of the first of the optimizer's groups, when those of others are not there.
        """
        if not self._gathered:
            self._zero._hp_optimizer_states_linked = False
            self._zero._lazy_init_hp_params_optimizer_state()

    @property
    def _gathered(self) -> bool:
        """Whether parameters are whole only while they compute: stage 3."""
        return any(hasattr(parameter, "ds_id") for parameter in self._whole.values())

    @property
    def _flats(self) -> list[Tensor]:
        """Return what DeepSpeed's optimizer of any stage lets ours update: this rank's parts of flat parameters."""
        names = ("fp32_partitioned_groups_flat", "fp32_groups_flat_partition", "single_partition_of_fp32_groups")
        found: list[Tensor] = next(getattr(self._zero, name) for name in names if hasattr(self._zero, name))
        return found

    def _state_keys(self) -> tuple[dict[str, Tensor], list[str]]:
        """Return the step counts, the same for all parameters, and the names of states of a parameter's shape."""
        state: Any = self.optimizer.state
        kept: dict[str, Tensor] = state.get(self._flats[0], {})
        counts = {key: value for key, value in kept.items() if not value.ndim}
        return counts, [key for key in kept if key not in counts]

    def _full(self, parameter: nn.Parameter, key: str | None = None) -> Tensor:
        """Return all of a parameter's master, or of a state; the same on all ranks."""
        from deepspeed import utils, zero

        if not parameter.requires_grad:
            with zero.GatheredParameters([parameter]):
                return parameter.detach().float()
        if key is not None:
            state: Tensor = utils.safe_get_full_optimizer_state(parameter, key)
            return state
        master: Tensor = utils.safe_get_full_fp32_param(parameter)
        return master

    def _set(self, parameter: nn.Parameter, whole: Tensor, key: str | None = None) -> None:
        """Make a whole tensor, the same on all ranks, what DeepSpeed has of a master, or of a state."""
        from deepspeed import utils, zero

        if parameter.requires_grad:
            place = "fp32_param" if key is None else "optimizer_state"
            where = "local" if self._gathered else "full"
            # That of "full" fails at stage 3 where the ranks do not divide a parameter's elements.
            value = self._slice(parameter, whole) if self._gathered else whole
            getattr(utils, f"safe_set_{where}_{place}")(parameter, value, *([] if key is None else [key]))
        if key is None and (self._gathered or not parameter.requires_grad):
            with zero.GatheredParameters([parameter], modifier_rank=0), torch.no_grad():
                parameter.copy_(whole)

    def _slice(self, parameter: Any, whole: Tensor) -> Tensor:
        """Return this rank's elements of a parameter as stage 3 cuts it: flat, the last filled up with zeros."""
        size = parameter.ds_tensor.numel()
        own = whole.flatten()[self.shard_rank * size : (self.shard_rank + 1) * size]
        return nn.functional.pad(own, (0, size - own.numel()))

    def _join(self, name: str, rows: Tensor) -> Tensor:
        return join_rows(rows, self.parts[name], self._engine.device)


def start(model: nn.Module, optimizer: Factory, config: dict[str, Any], *, kind: str, local_rank: int = 0) -> DeepSpeed:
    """Hand a model that is on its device over to DeepSpeed, in place, on all ranks of the default process group.

    `optimizer` is called with stand-ins for the fp32 masters, which have the parameters' shapes and order, and no
    memory. Alone, a group of one is made. Precision and recomputation are applied before. Raises InputError for NVMe
    without the library for it, and where DeepSpeed was loaded for another kind of device.
    """
    deepspeed = _library(kind)
    os.environ.setdefault("LOCAL_RANK", str(local_rank))
    if not dist.is_initialized():
        dist.init_process_group("gloo" if kind == "cpu" else "nccl", store=HashStore(), rank=0, world_size=1)
    _check_nvme(deepspeed, config)
    built = optimizer(_stand_ins(model.parameters()))
    _give_back(built)
    low = any(config[name]["enabled"] for name in ("bf16", "fp16"))
    masters = _first_masters(model) if low else {}
    with (
        Path(os.devnull).open("w") as nowhere,
        redirect_stdout(nowhere),
    ):  # it tells of memory there, whatever its level
        engine, *_ = deepspeed.initialize(model=model, optimizer=built, config=dict(config))
    held = DeepSpeed(model, engine, built)
    enter(model, engine)
    if low:
        with held.laid_out(changed=True):
            for name, rows in masters.items():
                held.parameters[name].data.copy_(rows)
    return held


def _library(kind: str) -> Any:
    """Import DeepSpeed for a kind of device."""
    os.environ["DS_ACCELERATOR"] = kind
    warnings.filterwarnings("ignore", RENAMED, FutureWarning)
    import deepspeed
    from deepspeed.accelerator import get_accelerator

    found = get_accelerator().device_name()
    if found != kind:
        raise InputError(f"sharding.engine: deepspeed was loaded for {found} before, and is to train on {kind}")
    deepspeed.ops.__compatible_ops__[UNUSED_KERNELS] = False
    return deepspeed


def _check_nvme(deepspeed: Any, config: Mapping[str, Any]) -> None:
    place = config["zero_optimization"].get("offload_optimizer", {})
    if place.get("device") != "nvme":
        return
    builder = deepspeed.accelerator.get_accelerator().create_op_builder("AsyncIOBuilder")
    if builder is None or not builder.is_compatible(verbose=False):
        raise InputError(
            "sharding.offload: nvme: DeepSpeed finds no libaio to build its reader with; install libaio's development "
            "package (libaio-dev on Debian and Ubuntu) and a C++ compiler, or use sharding.offload=all"
        )


def _stand_ins(parameters: Iterable[nn.Parameter]) -> list[nn.Parameter]:
    """Return fp32 tensors of the same shapes on the same devices, each of one number of memory."""
    found = []
    for parameter in parameters:
        number = torch.zeros((), dtype=torch.float32, device=parameter.device)
        found.append(nn.Parameter(number.expand(parameter.shape), requires_grad=parameter.requires_grad))
        found[-1]._stands_for = parameter  # type: ignore[attr-defined]
    return found


def _give_back(optimizer: Optimizer) -> None:
    """Put the parameters where their stand-ins are in an optimizer."""
    for group in optimizer.param_groups:
        group["params"] = [stand_in._stands_for for stand_in in group["params"]]


def _first_masters(model: nn.Module) -> dict[str, Tensor]:
    """Return this rank's rows of weights that DeepSpeed is about to round, in host memory."""
    rank, ranks = dist.get_rank(), dist.get_world_size()
    found = {}
    for name, parameter in model.named_parameters():
        part = rows_of(tuple(parameter.shape), rank, ranks)
        found[name] = take_rows(parameter, part).float()
    return found


def _check_counts(held: Mapping[str, Mapping[str, Tensor]]) -> None:
    found = {float(state["step"]) for state in held.values() if "step" in state}
    if len(found) > 1:
        numbers = ", ".join(f"{count:g}" for count in sorted(found)[:3])
        raise InputError(f"sharding.engine: deepspeed has one step count for all parameters, and here are {numbers}")
