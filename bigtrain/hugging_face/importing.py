"""From a Hugging Face folder to one that `train.init_from` takes: a checkpoint of step 0, without a run."""

from __future__ import annotations

import dataclasses
import json
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path
from typing import Any, NamedTuple

from pydantic import ValidationError

from bigtrain.checkpoint import manifest
from bigtrain.checkpoint.state import PLAN
from bigtrain.checkpoint.state import WEIGHTS as OWN_WEIGHTS
from bigtrain.checkpoint.tensors import Outline, write_bytes, write_outlines
from bigtrain.config.checks import recipe_faults
from bigtrain.config.dump import to_yaml
from bigtrain.config.model import ModelConfig
from bigtrain.config.schema import ModelSection, Recipe
from bigtrain.data.tokenizer import id_count, open_tokenizer
from bigtrain.errors import Fault, InputError
from bigtrain.hugging_face.layout import own_outlines
from bigtrain.hugging_face.source import TOKENIZER, FileTensor, are_equal, read_config, read_tensors
from bigtrain.hugging_face.target import check_unused, new_folder
from bigtrain.hugging_face.tokenizer_files import read_kept
from bigtrain.models.hf import drop_copies, modern_names, refuse_differences, their_shapes
from bigtrain.models.hf_config import CONFIG, config_from_json
from bigtrain.models.shape import parameters

EVALUATED_LENGTH = 512
"""Tokens of a row when the folder itself is evaluated, as far as the model reads so many."""


class Imported(NamedTuple):
    """What was made: the model's shape, and the tensors of the source that no model here has."""

    folder: Path
    config: ModelConfig
    parameters: int
    tokenizer: bool
    left_out: tuple[str, ...]


def import_folder(source: Path, out: Path) -> Imported:
    """Make a folder for `train.init_from`, evaluation and export of a Hugging Face folder. One tensor is in memory.

    Raises InputError for a folder that cannot be used: an architecture or a feature that is not here, weights that do
    not match config.json, with the first three differences, pickles, an `out` that exists.
    """
    source, out = source.expanduser(), out.expanduser()
    check_unused(out)
    config_json = read_config(source)
    found = read_tensors(source, config_json)
    with _named(source):
        config = config_from_json(config_json)
        outlines, left_out = _matched(config, found)
        recipe = _recipe(config)
    texts = read_kept(source) | {
        PLAN: to_yaml(recipe).encode(),
        CONFIG: json.dumps(config_json, indent=2).encode(),
    }
    tokenizer = (source / TOKENIZER).is_file()
    if tokenizer:
        texts[TOKENIZER] = _tokenizer(source / TOKENIZER, config).encode()
    with new_folder(out, sum(outline.size for outline in outlines.values())) as aside:
        files = {OWN_WEIGHTS: write_outlines(aside / OWN_WEIGHTS, outlines, {})}
        files |= {name: write_bytes(aside / name, text) for name, text in texts.items()}
        content = {"step": 0, "files": {name: digest._asdict() for name, digest in files.items()}, "world_size": 1}
        write_bytes(aside / manifest.MANIFEST, manifest.encode(content))
    return Imported(out, config, parameters(config), tokenizer, left_out)


@contextmanager
def _named(source: Path) -> Iterator[None]:
    """Put the folder into faults of its config.json and of its tensors, which say no place."""
    try:
        yield
    except InputError as error:
        places = {CONFIG: str(source / CONFIG), "": str(source)}
        raise type(error)(
            *(fault._replace(where=places.get(fault.where, fault.where)) for fault in error.faults)
        ) from error


def _matched(config: ModelConfig, found: Mapping[str, FileTensor]) -> tuple[dict[str, Outline], tuple[str, ...]]:
    theirs = modern_names(config, found)
    drop_copies(config, theirs, are_equal)
    refuse_differences(their_shapes(config), theirs)
    used = {id(tensor) for tensor in modern_names(config, found).values()}
    return own_outlines(config, theirs), tuple(name for name, tensor in found.items() if id(tensor) not in used)


def _tokenizer(path: Path, config: ModelConfig) -> str:
    """Return a tokenizer.json as tokenized data keep it, to which a run's is compared: no truncation, no padding.

    Raises InputError for one that is none, or has tokens that the model does not know.
    """
    tokenizer = open_tokenizer(path)
    count = id_count(tokenizer)
    if count > config.vocab_size:
        text = f"has {count} tokens, and config.json a vocabulary of {config.vocab_size}; put the model's own there"
        raise InputError(Fault(str(path), "", text))
    return tokenizer.to_str(pretty=True)


def _recipe(config: ModelConfig) -> Recipe:
    """Return a recipe with the whole shape; the rest is what an evaluation of the folder goes by.

    Raises InputError for a shape that no recipe has.
    """
    shape = {key: value for key, value in dataclasses.asdict(config).items() if key in ModelSection.model_fields}
    if config.family != "llama":
        del shape["num_key_value_heads"]
    objective = "clm" if config.causal else "mlm_nsp" if config.next_sentence else "mlm"
    length = min(EVALUATED_LENGTH, config.max_position_embeddings)
    keys: dict[str, Any] = {
        "name": "imported",
        "model": shape,
        "data": {"vocab_size": config.vocab_size, "sequence_length": length},
        "train": {"objective": objective, "steps": 1, "global_batch_size": 8},
        "optimizer": {"learning_rate": 1e-4},
    }
    try:
        recipe = Recipe.model_validate(keys)
    except ValidationError as error:
        first = error.errors()[0]
        raise InputError(Fault(CONFIG, str(first["loc"][-1]), f"{first['input']!r}: {first['msg']}")) from error
    if faults := recipe_faults(recipe):
        raise InputError(*(Fault(CONFIG, fault.key, fault.text) for fault in faults))
    return recipe
