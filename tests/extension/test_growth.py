"""The tensors of checkpoints with more rows: of any number of files, in all formats, bit by bit where blocks allow."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path

import pytest
import torch
from torch import Tensor

from bigtrain.checkpoint.moments import SCALE, Moment, read_moment
from bigtrain.checkpoint.store import CheckpointStore
from bigtrain.checkpoint.stored import StoredTensors, file_name
from bigtrain.config.load import load_recipe
from bigtrain.config.model import ModelConfig
from bigtrain.config.schema import Recipe
from bigtrain.extension.growth import Grown, Growth
from bigtrain.optim.quantize import codec_for
from bigtrain.optim.recode import encode
from bigtrain.sharding.part import Part
from bigtrain.sharding.rows import rows_of, take_rows

FILE = "optimizer.safetensors"
USES = {"exp_avg": "first", "exp_avg_sq": "second"}
FILES = 3


def shape_of(vocab_size: int, width: int) -> ModelConfig:
    return ModelConfig("bert", vocab_size, width, 1, 1, 1, 4 * width, 16)


def recipe_in(folder: Path, name: str, state: str) -> Recipe:
    file = folder / "recipe.yaml"
    file.write_text(
        "model: {family: bert, hidden_size: 32, num_hidden_layers: 1, num_attention_heads: 1}\n"
        "data: {source: embedded}\n"
        "train: {objective: mlm, global_batch_size: 8, steps: 1}\n"
        f"optimizer: {{name: {name}, learning_rate: 1e-3, state: {state}}}\n"
        "amp: {precision: fp32, master_weights: fp32}\n"
    )
    return load_recipe(file)


def numbers(rows: int, width: int, real: int) -> Tensor:
    """Return a moment of so many rows, of which those behind the `real` ones are zero."""
    found = torch.randn((rows, width) if width else (rows,), generator=torch.Generator().manual_seed(rows)).abs()
    found[real:] = 0
    return found


def published(folder: Path, moments: Mapping[str, Tensor], state: str, files: int) -> StoredTensors:
    """Publish moments as so many ranks would, each with its rows in a format, and a count that is the same on all."""
    content: dict[str, dict[str, Tensor]] = {}
    parts: dict[str, dict[str, Part]] = {}
    for rank in range(files):
        file = file_name(FILE, rank, files)
        content[file], parts[file] = ({"tokens.weight.step": torch.tensor(3.0)} if rank == 0 else {}), {}
        for name, values in moments.items():
            part, key = rows_of(tuple(values.shape), rank, files), name.rpartition(".")[2]
            rows = take_rows(values, part)
            made = encode(codec_for(key, USES[key], state, rows.numel()), rows)
            content[file] |= {name.removesuffix(key) + kept: tensor for kept, tensor in made.items()}
            parts[file][name] = part
    return StoredTensors(CheckpointStore(folder).save(3, content, {}, parts if files > 1 else {}), FILE)


def grown(stored: StoredTensors, folder: Path, growth: Growth, recipe: Recipe, state: str) -> tuple[StoredTensors, int]:
    made = Grown(growth)
    made.add_states(stored, recipe, state)
    return StoredTensors(CheckpointStore(folder).save(3, made.tensors, {}, made.parts), FILE), made.rounded


def values(stored: StoredTensors, name: str, shape: tuple[int, ...], state: str) -> Tensor:
    key = name.rpartition(".")[2]
    return read_moment(stored, Moment(name, key, USES[key], state), Part.of_whole(shape), "fp32")[0][key]


@pytest.mark.parametrize("files", [1, FILES])
@pytest.mark.parametrize("state", ["fp32", "bf16", "8bit", "4bit"])
def test_old_rows_keep_their_numbers_and_new_ones_are_zero(tmp_path: Path, state: str, files: int) -> None:
    growth = Growth(shape_of(120, 256), 300)
    moments = {f"{name}.{key}": numbers(128, width, 120) for key in USES for name, width in NAMES.items()}
    stored = published(tmp_path / "before", moments, state, files)
    after, rounded = grown(stored, tmp_path / "after", growth, recipe_in(tmp_path, "lamb", state), state)
    assert len(after.files) == files
    assert rounded == 0
    assert after.entries.keys() == stored.entries.keys()
    assert after.read("tokens.weight.step", Part.of_whole(())) == 3
    for name, old in moments.items():
        was, now = (values(one, name, (rows, *old.shape[1:]), state) for one, rows in ((stored, 128), (after, 320)))
        assert torch.equal(now[:128], was)
        assert not now[128:].any()


NAMES = {"tokens.weight": 256, "decoder_bias": 0}


@pytest.mark.parametrize("files", [1, FILES])
def test_blocks_that_fall_otherwise_are_rounded_to_the_nearest_and_counted(tmp_path: Path, files: int) -> None:
    growth = Growth(shape_of(120, 100), 300)
    moments = {f"tokens.weight.{key}": numbers(128, 100, 120) for key in USES}
    stored = published(tmp_path / "before", moments, "8bit", files)
    after, rounded = grown(stored, tmp_path / "after", growth, recipe_in(tmp_path, "adamw", "8bit"), "8bit")
    assert (rounded > 0) == (files > 1)
    for name in moments:
        was, now = (values(one, name, (rows, 100), "8bit") for one, rows in ((stored, 128), (after, 320)))
        assert torch.equal(now[:128], was) or files > 1
        assert torch.allclose(now[:128], was, atol=0.1 * float(was.max()))
        assert not now[128:].any()


def test_a_vector_that_becomes_large_enough_for_few_bits_is_rounded_and_counted(tmp_path: Path) -> None:
    growth = Growth(shape_of(4000, 32), 4100)
    stored = published(tmp_path / "before", {"decoder_bias.exp_avg": numbers(4032, 0, 4000)}, "8bit", 1)
    after, rounded = grown(stored, tmp_path / "after", growth, recipe_in(tmp_path, "adamw", "8bit"), "8bit")
    assert rounded == 1
    assert f"decoder_bias.exp_avg{SCALE}" in after.entries
    was, now = (values(one, "decoder_bias.exp_avg", (rows,), "8bit") for one, rows in ((stored, 4032), (after, 4160)))
    assert torch.allclose(now[:4032], was, atol=0.02 * float(was.max()))


@pytest.mark.parametrize("files", [1, FILES])
def test_weights_are_kept_new_ones_are_the_mean_and_padding_is_zero(tmp_path: Path, files: int) -> None:
    growth = Growth(shape_of(120, 6), 150)
    held = {"tokens.weight": numbers(128, 6, 120), "decoder_bias": numbers(128, 0, 120), "other": numbers(5, 3, 5)}
    content: dict[str, dict[str, Tensor]] = {}
    parts: dict[str, dict[str, Part]] = {}
    for rank in range(files):
        file = file_name("weights.safetensors", rank, files)
        cut = {name: rows_of(tuple(tensor.shape), rank, files) for name, tensor in held.items()}
        content[file] = {name: take_rows(tensor, cut[name]) for name, tensor in held.items()}
        parts[file] = cut if files > 1 else {}
    stored = StoredTensors(CheckpointStore(tmp_path / "before").save(3, content, {}, parts), "weights.safetensors")
    made = Grown(growth)
    made.add_weights(stored)
    folder = CheckpointStore(tmp_path / "after").save(3, made.tensors, {}, made.parts)
    found = dict(StoredTensors(folder, "weights.safetensors").whole())
    assert torch.equal(found["other"], held["other"])
    for name in ("tokens.weight", "decoder_bias"):
        assert len(found[name]) == 192
        assert torch.equal(found[name][:120], held[name][:120])
        mean = held[name][:120].double().mean(0).float()
        assert torch.equal(found[name][120:150], mean.expand_as(found[name][120:150]))
        assert not found[name][150:].any()


def test_only_what_has_a_row_for_each_token_grows() -> None:
    assert Growth(shape_of(64, 64), 65).wholes == {
        "decoder_bias": ((64,), (128,)),
        "tokens.weight": ((64, 64), (128, 64)),
    }
    assert Growth(shape_of(60, 64), 64).wholes["tokens.weight"] == ((64, 64), (64, 64))
