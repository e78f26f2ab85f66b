"""Tensors of one layout made of those in the other, from checkpoints of one file and of the shards of several ranks."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch
from safetensors.torch import save_file
from shapes import small_shape
from torch import Tensor

from bigtrain.checkpoint import manifest
from bigtrain.checkpoint.stored import StoredTensors, file_name
from bigtrain.checkpoint.tensors import write_bytes, write_tensors
from bigtrain.config.model import ModelConfig
from bigtrain.errors import CheckpointError
from bigtrain.hugging_face.layout import own_outlines, their_outlines
from bigtrain.hugging_face.source import read_tensors
from bigtrain.models import build_model
from bigtrain.models.hf import to_hugging_face
from bigtrain.models.shape import shared_products
from bigtrain.sharding.part import Part

FAMILIES = ("bert", "gpt", "llama")


def state(config: ModelConfig) -> dict[str, Tensor]:
    model = build_model(config)
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.normal_()
    return {name: tensor.detach() for name, tensor in model.state_dict().items()}


def checkpoint(folder: Path, ranks: list[tuple[dict[str, Tensor], dict[str, Part]]]) -> StoredTensors:
    folder.mkdir()
    files = {}
    for rank, (tensors, parts) in enumerate(ranks):
        name = file_name("weights.safetensors", rank, len(ranks))
        files[name] = write_tensors(folder / name, tensors, parts)._asdict()
    content = {"step": 1, "files": files, "world_size": len(ranks)}
    write_bytes(folder / manifest.MANIFEST, manifest.encode(content))
    return StoredTensors(folder, "weights.safetensors")


def cut_by_rows(tensors: dict[str, Tensor], ranks: int) -> list[tuple[dict[str, Tensor], dict[str, Part]]]:
    """Return what the ranks of a sharded run write: rows, rounded up."""
    found: list[tuple[dict[str, Tensor], dict[str, Part]]] = []
    for rank in range(ranks):
        held, parts = {}, {}
        for name, tensor in tensors.items():
            each = -(-len(tensor) // ranks)
            first = min(rank * each, len(tensor))
            held[name] = tensor[first : first + each]
            parts[name] = Part.of_rows(tuple(tensor.shape), [(first, len(held[name]))])
        found.append((held, parts))
    return found


def cut_by_heads(config: ModelConfig, tensors: dict[str, Tensor]) -> list[tuple[dict[str, Tensor], dict[str, Part]]]:
    """Return what two ranks write that share the products of each block; of the rest they have rows."""
    products = shared_products(config)
    found = cut_by_rows(tensors, 2)
    for name, tensor in tensors.items():
        inside = next((key for key in products if name.startswith("blocks.") and f".{key}." in name), None)
        if inside is None or (products[inside][0] == 1 and tensor.ndim == 1):
            continue
        dim, sections = products[inside]
        for rank, (held, parts) in enumerate(found):
            if dim == 1:
                half = tensor.shape[1] // 2
                held[name] = tensor[:, rank * half : (rank + 1) * half].contiguous()
                parts[name] = Part(tuple(tensor.shape), (0, rank * half), (len(tensor), half))
                continue
            starts = [sum(sections[:index]) for index in range(len(sections))]
            runs = [(start + rank * size // 2, size // 2) for start, size in zip(starts, sections, strict=True)]
            held[name] = torch.cat([tensor[first : first + count] for first, count in runs])
            parts[name] = Part.of_rows(tuple(tensor.shape), runs)
    return found


@pytest.mark.parametrize("family", FAMILIES)
@pytest.mark.parametrize("tied", (True, False))
def test_what_leaves_is_what_the_whole_model_would_be(tmp_path: Path, torch_seed: int, family: str, tied: bool) -> None:
    config = small_shape(family, tie_word_embeddings=tied)
    tensors = state(config)
    _, right = to_hugging_face(config, tensors)
    cuts = {"one": [(tensors, {})], "rows": cut_by_rows(tensors, 3), "heads": cut_by_heads(config, tensors)}
    for name, ranks in cuts.items():
        outlines = their_outlines(config, checkpoint(tmp_path / name, ranks))
        assert outlines.keys() == right.keys()
        for key, outline in outlines.items():
            made = outline.make()
            assert (outline.dtype, outline.shape) == (right[key].dtype, tuple(right[key].shape))
            assert torch.equal(made, right[key]), (name, key)


@pytest.mark.parametrize("family", FAMILIES)
def test_what_comes_in_is_the_built_model_with_zeros_as_padding(tmp_path: Path, torch_seed: int, family: str) -> None:
    config = small_shape(family, vocab_size=90)
    tensors = state(config)
    _, theirs = to_hugging_face(config, tensors)
    save_file(theirs, tmp_path / "model.safetensors")
    outlines = own_outlines(config, read_tensors(tmp_path, {}))
    assert outlines.keys() == tensors.keys()
    for name, outline in outlines.items():
        rows = 90 if name in ("tokens.weight", "decoder.weight", "decoder_bias") else len(tensors[name])
        made = outline.make()
        assert made.shape == tensors[name].shape
        assert torch.equal(made[:rows], tensors[name][:rows])
        assert not made[rows:].any()


def test_the_widest_types_come_first(tmp_path: Path, torch_seed: int) -> None:
    config = small_shape("bert")
    tensors = {name: tensor if "norm" in name else tensor.bfloat16() for name, tensor in state(config).items()}
    outlines = their_outlines(config, checkpoint(tmp_path / "run", [(tensors, {})]))
    sizes = [outline.dtype.itemsize for outline in outlines.values()]
    assert sizes == sorted(sizes, reverse=True)
    assert set(sizes) == {2, 4}


def test_types_that_weights_cannot_have_are_refused(tmp_path: Path) -> None:
    config = small_shape("llama")
    _, theirs = to_hugging_face(config, state(config))
    save_file(theirs | {"model.norm.weight": torch.ones(32, dtype=torch.int8)}, tmp_path / "model.safetensors")
    with pytest.raises(CheckpointError, match=r"model\.norm\.weight: of type I8; use F32, BF16 or F16"):
        own_outlines(config, read_tensors(tmp_path, {}))
    key = "model.layers.1.self_attn.k_proj.weight"
    save_file(theirs | {key: theirs[key].half()}, tmp_path / "model.safetensors")
    with pytest.raises(CheckpointError, match=rf"{key}: not of the type of model.*q_proj.weight, F32, with which"):
        own_outlines(config, read_tensors(tmp_path, {}))
