"""From a checkpoint to a folder that transformers loads."""

from __future__ import annotations

import json
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any, NamedTuple

from bigtrain.checkpoint.resume import stored_recipe
from bigtrain.checkpoint.state import TOKENIZER
from bigtrain.checkpoint.state import WEIGHTS as OWN_WEIGHTS
from bigtrain.checkpoint.store import find_checkpoint
from bigtrain.checkpoint.stored import StoredTensors
from bigtrain.checkpoint.tensors import Outline, write_bytes, write_outlines
from bigtrain.config.model import ModelConfig, resolve_model
from bigtrain.config.schema import Recipe
from bigtrain.data.tokenizer import open_tokenizer, special_tokens
from bigtrain.errors import CheckpointError
from bigtrain.hugging_face.layout import DIGITS, their_outlines
from bigtrain.hugging_face.source import INDEX, WEIGHTS
from bigtrain.hugging_face.target import check_unused, new_folder
from bigtrain.hugging_face.tokenizer_files import (
    TOKENIZER_CONFIG,
    generation_config,
    kept_files,
    special_ids,
    tokenizer_config,
)
from bigtrain.models.hf import own_shapes, refuse_differences
from bigtrain.models.hf_config import CONFIG, GENERATION_CONFIG, config_to_json, kept_config
from bigtrain.models.shape import parameters

MAX_SHARD_BYTES = 5 * 10**9
"""Beyond this, weights are divided among files; a larger tensor has one for itself."""

LOADERS = {"BertForMaskedLM": "AutoModelForMaskedLM", "BertForPreTraining": "AutoModelForPreTraining"}

OUTDATED = ("_name_or_path", "torch_dtype", "transformers_version")
"""What a config.json says of the file it was, not of the model."""


class Exported(NamedTuple):
    """What was written from which checkpoint; `size` in bytes of the weights."""

    folder: Path
    checkpoint: Path
    architecture: str
    parameters: int
    files: int
    size: int
    tokenizer: bool

    @property
    def loader(self) -> str:
        """Return the class of transformers that loads it."""
        return LOADERS.get(self.architecture, "AutoModelForCausalLM")


class _Shape(NamedTuple):
    shape: tuple[int, ...]


def export_folder(run: Path, out: Path, *, max_shard_bytes: int = MAX_SHARD_BYTES) -> Exported:
    """Write a run's newest checkpoint, or a checkpoint or imported folder itself, as a Hugging Face folder.

    The weights keep the types that they are stored in, and the tokenizer's files of an imported folder every byte. One
    tensor at a time is in memory. Raises CheckpointError for what is none, InputError where `out` cannot be made.
    """
    out = out.expanduser()
    check_unused(out)
    checkpoint = find_checkpoint(run.expanduser())
    config = model_of(stored_recipe(checkpoint), checkpoint)
    stored = StoredTensors(checkpoint, OWN_WEIGHTS)
    refuse_differences(own_shapes(config), {name: _Shape(stored.shape(name)) for name in stored.entries})
    outlines = their_outlines(config, stored)
    shards = _named(list(_divided(outlines, max_shard_bytes)))
    size = sum(outline.size for outline in outlines.values())
    texts = _texts(config, checkpoint, outlines)
    if len(shards) > 1:
        places = {name: file for file, held in shards.items() for name in held}
        texts[INDEX] = {"metadata": {"total_size": size}, "weight_map": places}
    kept, tokenizer = kept_files(checkpoint), (checkpoint / TOKENIZER).is_file()
    if tokenizer:
        kept.setdefault(TOKENIZER, (checkpoint / TOKENIZER).read_bytes())
    files = {file: (json.dumps(content, indent=2) + "\n").encode() for file, content in texts.items()} | kept
    with new_folder(out, size) as aside:
        for file, held in shards.items():
            write_outlines(aside / file, held, {"format": "pt"})
        for file, text in files.items():
            write_bytes(aside / file, text)
    architecture = str(texts[CONFIG]["architectures"][0])
    return Exported(out, checkpoint, architecture, parameters(config), len(shards), size, tokenizer)


def model_of(recipe: Recipe, folder: Path) -> ModelConfig:
    """Return the shape in the resolved recipe of a checkpoint. Raises CheckpointError where it is open."""
    size = recipe.model.vocab_size
    if size == "auto":
        raise CheckpointError(f"{folder}: its plan.yaml leaves model.vocab_size open; it is not the plan of a run")
    length, pairs = recipe.data.sequence_length, recipe.train.objective == "mlm_nsp"
    return resolve_model(recipe.model, vocab_size=size, sequence_length=length, next_sentence=pairs)


def _texts(config: ModelConfig, checkpoint: Path, outlines: Mapping[str, Outline]) -> dict[str, Any]:
    """Return the JSON files of the folder by name; what a config.json that came in says besides is kept."""
    source = kept_config(checkpoint)
    tokenizer = open_tokenizer(checkpoint / TOKENIZER) if (checkpoint / TOKENIZER).is_file() else None
    marks = None if tokenizer is None else special_tokens(tokenizer)
    ids = special_ids(config, marks, source)
    widest = max((outline.dtype for outline in outlines.values()), key=lambda dtype: DIGITS[dtype])
    kept = {key: value for key, value in source.items() if key not in OUTDATED}
    texts: dict[str, Any] = {CONFIG: {**kept, **config_to_json(config), **ids, "dtype": str(widest).partition(".")[2]}}
    if config.causal:
        texts[GENERATION_CONFIG] = generation_config(ids)
    if tokenizer is not None and marks is not None:
        texts[TOKENIZER_CONFIG] = tokenizer_config(config, tokenizer, marks)
    return texts


def _divided(outlines: Mapping[str, Outline], most_bytes: int) -> Iterator[dict[str, Outline]]:
    held: dict[str, Outline] = {}
    size = 0
    for name, outline in outlines.items():
        if held and size + outline.size > most_bytes:
            yield held
            held, size = {}, 0
        held[name] = outline
        size += outline.size
    yield held


def _named(shards: list[dict[str, Outline]]) -> dict[str, dict[str, Outline]]:
    if len(shards) == 1:
        return {WEIGHTS: shards[0]}
    stem = WEIGHTS.removesuffix(".safetensors")
    return {f"{stem}-{i:05d}-of-{len(shards):05d}.safetensors": held for i, held in enumerate(shards, 1)}
