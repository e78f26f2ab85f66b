"""What the state of a run is: weights, optimizer states, counters and the position in the data."""

from __future__ import annotations

import json
from collections.abc import Iterator, Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn

from bigtrain.checkpoint.counts import read_counts
from bigtrain.checkpoint.finite import check_finite
from bigtrain.checkpoint.optimizer import load_optimizer, optimizer_state, own_states, state_format
from bigtrain.checkpoint.saver import Saver
from bigtrain.checkpoint.store import CheckpointStore
from bigtrain.checkpoint.stored import StoredTensors, file_name
from bigtrain.checkpoint.together import together
from bigtrain.data.loader import Loader
from bigtrain.engine import Engine
from bigtrain.errors import CheckpointError
from bigtrain.optim.offload import kept_weights
from bigtrain.optim.weights import MASTER
from bigtrain.sharding.part import Part

WEIGHTS, OPTIMIZER, STATE, PLAN, TOKENIZER = (
    "weights.safetensors",
    "optimizer.safetensors",
    "state.json",
    "plan.yaml",
    "tokenizer.json",
)
"""The files of a checkpoint. On several ranks the tensors are in more than one: `stored.file_name`."""

OBJECTIVES_OWN = "next_sentence."
"""How the names begin of weights that one objective of a family has and another has not."""


class Held(NamedTuple):
    """What is kept here of a parameter or a buffer, and which part of it that is."""

    tensor: Tensor
    part: Part


@dataclass
class TrainState:
    """Everything that the next step depends on and that is no pure function of the recipe.

    `tokens` counts non-padding tokens since the start; `step` is the engine's. `notes` is what the loop remembers of
    earlier steps and decides by, JSON by name: the steps that were skipped.
    """

    engine: Engine
    loader: Loader
    tokens: int = 0
    notes: dict[str, Any] = field(default_factory=dict)

    @property
    def step(self) -> int:
        return self.engine.steps_taken

    def save(self, store: CheckpointStore | Saver, texts: Mapping[str, str]) -> Path:
        """Publish the state as a checkpoint; `texts` (the plan, the tokenizer) go into it as files.

        On several ranks all call this together. Those that have a whole model between them write a file each. Raises
        BigtrainError, and writes nothing, where a number is not finite.
        """
        with self.engine.laid_out():
            return self._save(store, texts)

    def _save(self, store: CheckpointStore | Saver, texts: Mapping[str, str]) -> Path:
        engine = self.engine
        counts = {
            "step": self.step,
            "tokens": self.tokens,
            "notes": self.notes,
            "loader": self.loader.state_dict(),
            "loss_scale": engine.loss_scale.state_dict(),
            "optimizer_class": type(engine.optimizer).__name__,
            "optimizer_format": state_format(engine),
            "optimizer": optimizer_state(engine)[1],
        }
        if engine.device.type == "cuda":
            torch.cuda.synchronize(engine.device)  # what is on its way to the host is read there
        files: dict[str, dict[str, Tensor]] = {}
        parts: dict[str, dict[str, Part]] = {}
        if engine.writes:
            for kind, (tensors, cut) in ((WEIGHTS, own_weights(engine)), (OPTIMIZER, own_states(engine))):
                name = file_name(kind, engine.shard_rank, engine.shards)
                files[name], parts[name] = tensors, cut
        check_finite(self.step, files, engine.world)
        return store.save(self.step, files, {**texts, STATE: json.dumps(counts)}, parts)

    def restore(self, folder: Path, *, other_data: bool = False) -> None:
        """Become the state that a verified checkpoint holds.

        Raises CheckpointError if it is of another model, DataError if of other data, unless `other_data` allows that.
        """
        counts = read_counts(folder / STATE)
        used, here = counts["optimizer_class"], type(self.engine.optimizer).__name__
        if used != here:
            text = f"its optimizer states are of {used}, not of {here}"
            raise CheckpointError(f"{folder}: {text}; start a new run with train.init_from={folder}")
        self.load_weights(folder)
        used_format = counts.get("optimizer_format", state_format(self.engine))
        with self.engine.laid_out(changed=True):
            load_optimizer(self.engine, StoredTensors(folder, OPTIMIZER), counts["optimizer"], used_format)
        self.engine.loss_scale.load_state_dict(counts["loss_scale"])
        self.engine.steps_taken = counts["step"]
        self.tokens, self.notes = counts["tokens"], counts.get("notes") or {}
        self.loader.load_state_dict(counts["loader"], other_data=other_data)

    def load_weights(self, folder: Path, *, new_objective: bool = False) -> None:
        """Take over this rank's part of a verified checkpoint's weights. Raises CheckpointError as `load_weights`.

        With `new_objective` a head that one of the objectives alone has may be there or here only: it is left out, or
        stays as it is.
        """
        engine = self.engine
        with engine.laid_out(changed=True):
            optional = OBJECTIVES_OWN if new_objective else None
            together(engine.world, lambda: _load(dict(held_weights(engine)), folder, optional))
            for parameter in engine.parameters.values():
                master = engine.optimizer.state.get(parameter, {}).get(MASTER)
                if master is not None:
                    parameter.detach().copy_(master)


def weights(model: nn.Module) -> Iterator[tuple[str, Tensor]]:
    """Yield a model's parameters and persistent buffers by name, tied ones once."""
    seen: set[int] = set()
    for name, tensor in model.state_dict(keep_vars=True).items():
        if id(tensor) not in seen:
            seen.add(id(tensor))
            yield name, tensor.detach()


def held_weights(engine: Engine) -> Iterator[tuple[str, Held]]:
    """Yield what this rank keeps of each of a model's weights, masters where it has some; of buffers it is all."""
    parameters, parts = engine.parameters, engine.parts
    for name, tensor in weights(engine.model):
        if name in parameters:
            yield name, Held(kept_weights(engine.optimizer, parameters[name]), parts[name])
        else:
            yield name, Held(tensor, Part.of_whole(tuple(tensor.shape)))


def own_weights(engine: Engine) -> tuple[dict[str, Tensor], dict[str, Part]]:
    """Return the weights that this rank writes, and which of them are parts: of buffers the first rank writes all."""
    held, own = dict(held_weights(engine)), engine.spread.own
    if engine.shards == 1:
        return {name: tensor for name, (tensor, _) in held.items()}, {}
    parts = {name: part for name, part in engine.parts.items() if name in own}
    written = {name: tensor for name, (tensor, _) in held.items() if name in parts or engine.shard_rank == 0}
    return written, parts


def load_weights(model: nn.Module, folder: Path) -> None:
    """Copy a verified checkpoint's weights into a model that is whole here, one tensor at a time.

    Raises CheckpointError with the first three differences, before anything is changed, if names or shapes differ.
    """
    _load({name: Held(tensor, Part.of_whole(tuple(tensor.shape))) for name, tensor in weights(model)}, folder)


def _load(wanted: Mapping[str, Held], folder: Path, optional: str | None = None) -> dict[str, int]:
    """Fill what is wanted; return, as `together` passes it on, how many tensors there were.

    Names that begin with `optional` may be on one side alone.
    """
    stored = StoredTensors(folder, WEIGHTS)
    present = {name: stored.shape(name) for name in stored.entries}
    if optional is not None:
        one_sided = {name for name in present.keys() ^ wanted.keys() if name.startswith(optional)}
        present = {name: shape for name, shape in present.items() if name not in one_sided}
        wanted = {name: held for name, held in wanted.items() if name not in one_sided}
    differences = [f"{name} is absent" for name in wanted if name not in present]
    differences += [f"{name} is not in the model" for name in present if name not in wanted]
    differences += [
        f"{name} is {present[name]}, in the model {held.part.whole}"
        for name, held in wanted.items()
        if name in present and present[name] != held.part.whole
    ]
    if differences:
        raise CheckpointError(f"{stored.files[0]}: weights of another model: " + "; ".join(differences[:3]))
    for name in present:
        wanted[name].tensor.copy_(stored.read(name, wanted[name].part))
    return {"tensors": len(present)}
