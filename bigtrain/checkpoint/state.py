"""What the state of a run is: weights, optimizer states, counters and the position in the data."""

from __future__ import annotations

import itertools
import json
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from torch import Tensor, nn

from bigtrain.checkpoint import tensors
from bigtrain.checkpoint.store import CheckpointStore
from bigtrain.data.loader import Loader
from bigtrain.engine import Engine
from bigtrain.errors import CheckpointError

WEIGHTS, OPTIMIZER, STATE, PLAN, TOKENIZER = (
    "weights.safetensors",
    "optimizer.safetensors",
    "state.json",
    "plan.yaml",
    "tokenizer.json",
)


@dataclass
class TrainState:
    """Everything that the next step depends on and that is no pure function of the recipe.

    `tokens` counts non-padding tokens since the start; `step` is the engine's.
    """

    engine: Engine
    loader: Loader
    tokens: int = 0

    @property
    def step(self) -> int:
        return self.engine.steps_taken

    def save(self, store: CheckpointStore, texts: Mapping[str, str]) -> Path:
        """Publish the state as a checkpoint; `texts` (the plan, the tokenizer) go into it as files."""
        moments, counters = optimizer_state(self.engine)
        counts = {
            "step": self.step,
            "tokens": self.tokens,
            "loader": self.loader.state_dict(),
            "loss_scale": self.engine.loss_scale.state_dict(),
            "optimizer_class": type(self.engine.optimizer).__name__,
            "optimizer": counters,
        }
        files = {WEIGHTS: dict(weights(self.engine.model)), OPTIMIZER: moments}
        return store.save(self.step, files, {**texts, STATE: json.dumps(counts)})

    def restore(self, folder: Path, *, other_data: bool = False) -> None:
        """Become the state that a verified checkpoint holds.

        Raises CheckpointError if it is of another model, DataError if of other data, unless `other_data` allows that.
        """
        counts = json.loads((folder / STATE).read_text())
        used, here = counts["optimizer_class"], type(self.engine.optimizer).__name__
        if used != here:
            text = f"its optimizer states are of {used}, not of {here}"
            raise CheckpointError(f"{folder}: {text}; start a new run with train.init_from={folder}")
        load_weights(self.engine.model, folder)
        load_optimizer(self.engine, folder, counts["optimizer"])
        self.engine.loss_scale.load_state_dict(counts["loss_scale"])
        self.engine.steps_taken = counts["step"]
        self.tokens = counts["tokens"]
        self.loader.load_state_dict(counts["loader"], other_data=other_data)


def weights(model: nn.Module) -> Iterator[tuple[str, Tensor]]:
    """Yield a model's parameters and persistent buffers by name, tied ones once."""
    seen: set[int] = set()
    for name, tensor in model.state_dict(keep_vars=True).items():
        if id(tensor) not in seen:
            seen.add(id(tensor))
            yield name, tensor.detach()


def load_weights(model: nn.Module, folder: Path) -> None:
    """Copy a checkpoint's weights into a model, one tensor at a time.

    Raises CheckpointError with the first three differences, before anything is changed, if names or shapes differ.
    """
    path = folder / WEIGHTS
    wanted = dict(weights(model))
    present = {name: entry.shape for name, entry in tensors.read_header(path).items()}
    differences = [f"{name} is absent" for name in wanted if name not in present]
    differences += [f"{name} is not in the model" for name in present if name not in wanted]
    differences += [
        f"{name} is {tuple(present[name])}, in the model {tuple(tensor.shape)}"
        for name, tensor in wanted.items()
        if name in present and present[name] != tensor.shape
    ]
    if differences:
        raise CheckpointError(f"{path}: weights of another model: " + "; ".join(differences[:3]))
    for name, tensor in tensors.read_tensors(path):
        wanted[name].copy_(tensor)


def optimizer_state(engine: Engine) -> tuple[dict[str, Tensor], dict[str, Any]]:
    """Return an optimizer's states as tensors and as plain values, each under `PARAMETER.KEY`."""
    moments: dict[str, Tensor] = {}
    counters: dict[str, Any] = {}
    for name, parameter in engine.model.named_parameters():
        for key, value in engine.optimizer.state.get(parameter, {}).items():
            if isinstance(value, Tensor):
                moments[f"{name}.{key}"] = value
            else:
                counters[f"{name}.{key}"] = value
    return moments, counters


def load_optimizer(engine: Engine, folder: Path, counters: Mapping[str, Any]) -> None:
    """Give an optimizer the states of a checkpoint. Raises CheckpointError for a state of an unknown parameter."""
    parameters = dict(engine.model.named_parameters())
    on_device = any(group.get("fused") or group.get("capturable") for group in engine.optimizer.param_groups)
    for full_name, value in itertools.chain(counters.items(), tensors.read_tensors(folder / OPTIMIZER)):
        name, _, key = full_name.rpartition(".")
        if name not in parameters:
            raise CheckpointError(f"{folder / OPTIMIZER}: a state of {name!r}, which is not in the model")
        if isinstance(value, Tensor) and (key != "step" or on_device):
            value = value.to(parameters[name].device)
        engine.optimizer.state[parameters[name]][key] = value
