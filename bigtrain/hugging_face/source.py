"""A Hugging Face folder as it comes: config.json and safetensors, one file or an index of shards; never a pickle.

Formats: huggingface.co/docs/safetensors, and the index that transformers writes beside shards.
"""

from __future__ import annotations

import re
from collections.abc import Mapping
from pathlib import Path
from typing import Any, NamedTuple

import torch
from torch import Tensor

from bigtrain import strict_json
from bigtrain.checkpoint.boxes import Run
from bigtrain.checkpoint.tensors import TensorEntry, read_header, read_runs
from bigtrain.errors import CheckpointError, Fault, InputError
from bigtrain.models.hf_config import CONFIG, FAMILIES

WEIGHTS, INDEX, TOKENIZER = "model.safetensors", "model.safetensors.index.json", "tokenizer.json"

PICKLES = ("pytorch_model.bin", "pytorch_model.bin.index.json")

COMPARED_ELEMENTS = 2**20
"""Of two tensors that should be the same, so many elements are held at a time."""

_SHARD = re.compile(r"[\w.-]+\.safetensors")


class FileTensor(NamedTuple):
    """A tensor in a file, not read yet."""

    path: Path
    entry: TensorEntry

    @property
    def shape(self) -> tuple[int, ...]:
        """Return its sizes."""
        return tuple(self.entry.shape)

    @property
    def dtype(self) -> torch.dtype:
        """Return the type of its elements."""
        return self.entry.dtype

    def read(self) -> Tensor:
        """Return it in host memory of its own."""
        tensor = torch.empty(self.shape, dtype=self.dtype)
        self.read_into(tensor, 0)
        return tensor

    def read_into(self, tensor: Tensor, start: int) -> None:
        """Read its elements into a contiguous tensor of the same dtype, from an element of that on."""
        read_runs(self.path, self.entry, [Run(0, start, self.elements)], tensor)

    @property
    def elements(self) -> int:
        """Return how many numbers it has."""
        return self.entry.shape.numel()


def are_equal(left: FileTensor, right: FileTensor) -> bool:
    """Tell whether two tensors have the same bits, a piece of both held at a time."""
    if (left.shape, left.dtype) != (right.shape, right.dtype):
        return False
    return all(
        torch.equal(_piece(left, start), _piece(right, start)) for start in range(0, left.elements, COMPARED_ELEMENTS)
    )


def _piece(tensor: FileTensor, start: int) -> Tensor:
    length = min(COMPARED_ELEMENTS, tensor.elements - start)
    found = torch.empty(length, dtype=tensor.dtype)
    read_runs(tensor.path, tensor.entry, [Run(start, 0, length)], found)
    return found.view(torch.uint8)


def read_config(folder: Path) -> dict[str, Any]:
    """Return a folder's config.json. Raises InputError where there is none to be used."""
    if not folder.is_dir():
        text = "no such folder; of a model on the hub, first: hf download ID --local-dir DIR"
        raise InputError(Fault("command line", "HF_DIR", f"{folder}: {text}"))
    path = folder / CONFIG
    if not path.is_file():
        text = f"no {CONFIG} in it; name a folder that save_pretrained wrote"
        raise InputError(Fault("command line", "HF_DIR", f"{folder}: {text}"))
    try:
        found = strict_json.read(path)
    except (OSError, ValueError) as error:
        raise InputError(f"{path}: {error}; it should hold one JSON object") from error
    if not isinstance(found, dict):
        raise InputError(f"{path}: not a JSON object; name a folder that save_pretrained wrote")
    if found.get("quantization_config"):
        text = "quantized weights are not supported; import the model that they were made of"
        raise InputError(Fault(str(path), "quantization_config", text))
    return found


def read_tensors(folder: Path, config_json: Mapping[str, Any]) -> dict[str, FileTensor]:
    """Return the tensors of a folder by name. Raises InputError where there are none that can be read safely."""
    if (folder / WEIGHTS).is_file():
        return _of_file(folder / WEIGHTS)
    if (folder / INDEX).is_file():
        return _of_index(folder / INDEX)
    pickle = next((name for name in PICKLES if (folder / name).exists()), None)
    if pickle is None:
        raise CheckpointError(f"{folder}: holds neither {WEIGHTS} nor {INDEX}; name a folder that has one")
    convert = f"transformers.{_loader(config_json)}.from_pretrained({str(folder)!r}).save_pretrained('NEW')"
    text = f"{pickle} is a pickle, which may run any code and is not read; if you trust it, convert it: {convert}"
    raise CheckpointError(f"{folder}: {text}")


def _loader(config_json: Mapping[str, Any]) -> str:
    """Return the class that holds all weights of the folder: another one would leave some out."""
    names = config_json.get("architectures")
    found = names if isinstance(names, list) else [names]
    return next((str(name) for name in found if str(name) in FAMILIES), "AutoModel")


def _of_file(path: Path) -> dict[str, FileTensor]:
    return {name: FileTensor(path, entry) for name, entry in read_header(path).items()}


def _of_index(path: Path) -> dict[str, FileTensor]:
    try:
        places = strict_json.read(path)["weight_map"]
        files = {str(name) for name in places.values()}
    except (OSError, ValueError, KeyError, TypeError, AttributeError) as error:
        raise CheckpointError(f"{path}: not an index of safetensors: it has no weight_map") from error
    found: dict[str, FileTensor] = {}
    for name in sorted(files):
        if not _SHARD.fullmatch(name):
            raise CheckpointError(f"{path}: {name!r} is no file of this folder; shards lie beside their index")
        if not (path.parent / name).is_file():
            raise CheckpointError(f"{path}: its shard {name} is missing; download or copy it again")
        found |= _of_file(path.parent / name)
    different = next(
        (name for name, place in places.items() if name not in found or found[name].path.name != place), None
    )
    if different is not None:
        raise CheckpointError(f"{path}: {different} is not in {places[different]}, where the index has it")
    return found
