"""A profile of any model: real steps of a copy of it, beside a trace of the same steps."""

from __future__ import annotations

import copy
import importlib
import sys
from collections.abc import Mapping, Sequence
from itertools import repeat
from pathlib import Path
from typing import Any

import torch
from torch import nn

import bigtrain
from bigtrain.batch import Batch, count_rows
from bigtrain.engine import Engine, prepare
from bigtrain.errors import InputError
from bigtrain.memory.predict import SECOND_STEP
from bigtrain.memory.trace_model import Forward, called, resized
from bigtrain.model_step import Factory, Subject, check_sample, factory_of
from bigtrain.planner.module_plan import ModulePlan
from bigtrain.planning_model import plan_model
from bigtrain.profiling.result import Predicted, Profile
from bigtrain.profiling.steps import LEAST_STEPS, Steps

UNBOUNDED = "1048576GiB"
"""A memory budget that nothing exceeds: what is measured has been chosen."""


def profile_model(
    model: nn.Module,
    sample: Batch,
    *,
    steps: int = LEAST_STEPS,
    micro_batch_size: int | None = None,
    recompute: str | Sequence[str] = "none",
    optimizer: str | Factory = "adamw",
    precision: str = "fp32",
    device: str | None = None,
    blocks: type[nn.Module] | Sequence[nn.Module] | None = None,
    forward: Forward = called,
    causal: bool = False,
    real: Sequence[str] = (),
    seed: int = 0,
) -> Profile:
    """Take a few real steps on the sample with a copy of any model, and set what they hold beside what was predicted.

    The model stays as it is, so a real one is held twice. All rows of the sample are a step, in micro-batches of
    `micro_batch_size`, without it in one. `device` is "cpu" or "cuda" of this machine; all else is as for `plan_model`.
    Raises InputError for a model that cannot be traced, and for less than three steps, which do not show the peak.
    """
    _check(steps, device)
    batch = resized(check_sample(sample), count_rows(sample))
    rows = count_rows(batch)
    plan = plan_model(
        model,
        batch,
        global_batch_size=rows,
        memory_budget=UNBOUNDED,
        optimizer=optimizer,
        precision=precision,
        device=device,
        micro_batch_size=rows if micro_batch_size is None else micro_batch_size,
        recompute=recompute,
        blocks=blocks,
        forward=forward,
        causal=causal,
        real=real,
        seed=seed,
    )
    subject = Subject(model, batch, factory_of(optimizer), forward, blocks)
    measured = Steps(
        build=lambda: _engine(subject, plan),
        batches=repeat(batch),
        blocks=lambda copied: [copied.get_submodule(name) for name in subject.block_names],
        device=plan.hardware.kind,
        seed=seed,
        forward=forward,
    ).measure(steps)
    assert plan.recording is not None
    return Profile(
        name=subject.name,
        device=plan.hardware.name,
        predicted=Predicted(plan.memory, plan.recording, SECOND_STEP, plan.seconds.total),
        measured=measured,
        changes=plan.changes,
        versions={"bigtrain": bigtrain.__version__, "torch": torch.__version__},
    )


def _check(steps: int, device: str | None) -> None:
    if steps < LEAST_STEPS:
        raise InputError(f"profile: {steps} steps do not show the peak; take at least {LEAST_STEPS}")
    if device not in (None, "cpu", "cuda"):
        raise InputError(f"device: {device!r} is not of this machine, where steps are measured; use cpu or cuda")


def load_model(name: str) -> tuple[nn.Module, Batch]:
    """Return what `module:callable` returns: a model and a sample, or a model that has one as its `sample`.

    The module is also looked for in the current folder. Raises InputError where there is none, and for anything else
    that the callable returns.
    """
    module, _, path = name.partition(":")
    if not module or not path:
        raise InputError(f"command line: --model: {name!r} does not name a callable; write module:callable")
    here = str(Path.cwd())
    if here not in sys.path:
        sys.path.insert(0, here)
    try:
        found: Any = importlib.import_module(module)
    except ModuleNotFoundError as error:
        if error.name is None or not f"{module}.".startswith(f"{error.name}."):
            raise  # it was found, and imports what is not there
        raise InputError(
            f"command line: --model: there is no module {error.name!r} in {here} or on the path; name one without .py"
        ) from error
    for part in path.split("."):
        if not hasattr(found, part):
            known = ", ".join(key for key in vars(found) if not key.startswith("_"))
            raise InputError(f"command line: --model: {module} has no {part!r}; it has {known or 'nothing'}")
        found = getattr(found, part)
    if not callable(found):
        raise InputError(
            f"command line: --model: {name} is a {type(found).__name__}; name a function without arguments"
        )
    return _model_and_sample(name, found())


def _model_and_sample(name: str, made: Any) -> tuple[nn.Module, Batch]:
    if isinstance(made, tuple) and len(made) == 2:
        model, sample = made
    else:
        model, sample = made, getattr(made, "sample", None)
    if not isinstance(model, nn.Module) or not isinstance(sample, Mapping):
        raise InputError(
            f"command line: --model: {name} returns a {type(made).__name__}; let it return a model and a sample, "
            "a mapping of names to tensors"
        )
    return model, sample


def _engine(subject: Subject, plan: ModulePlan) -> Engine:
    """Return the engine of a copy, which is made here so that its weights count."""
    copied = copy.deepcopy(subject.model).train()
    blocks = [copied.get_submodule(name) for name in subject.block_names]
    return prepare(copied, plan, subject.optimizer, blocks=blocks)
