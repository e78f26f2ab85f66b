"""Everything of a recipe that follows from the machine and from its own keys, before the search. No torch."""

from __future__ import annotations

import dataclasses
from typing import Any

from bigtrain.config.model import ModelConfig, resolve_model
from bigtrain.config.schema import Recipe
from bigtrain.config.shape_checks import fault
from bigtrain.data.vocabulary import vocabulary_size
from bigtrain.errors import DataError, RecipeError
from bigtrain.memory.predict import torch_threads
from bigtrain.planner import hardware as hardware_module
from bigtrain.planner.cluster import placed
from bigtrain.planner.hardware import Hardware
from bigtrain.planner.mechanisms import instead_of_auto
from bigtrain.planner.price import budget_bytes
from bigtrain.sharding.deepspeed_config import narrowed
from bigtrain.units import format_bytes


def settled(
    recipe: Recipe, hardware: Hardware | None, world_size: int | None, *, bounded: bool = True
) -> tuple[Recipe, ModelConfig, Hardware, int]:
    """Return a recipe in which `auto` stands only where the search chooses, its model, the hardware and the ranks.

    Without `bounded` any budget will do. Raises RecipeError where the recipe asks for what is not there.
    """
    recipe = narrowed(recipe)
    here = chosen_hardware(recipe, hardware)
    recipe, ranks = placed(recipe, world_size, devices=here.devices)
    hardware = _shared(recipe, here)
    model = resolve_model(
        recipe.model,
        vocab_size=_vocab_size(recipe),
        sequence_length=recipe.data.sequence_length,
        next_sentence=recipe.train.objective == "mlm_nsp",
    )
    keys: dict[str, dict[str, Any]] = {
        "model": _shape_keys(recipe, model),
        "train": {"device": hardware.kind, **instead_of_auto(recipe.train, compile=hardware.kind == "cuda")},
        "sharding": instead_of_auto(recipe.sharding, engine="fsdp2"),
        "memory": {"budget": _budget(recipe, hardware) if bounded else UNBOUNDED_BYTES},
    }
    sections = {name: getattr(recipe, name).model_copy(update=values) for name, values in keys.items()}
    return recipe.model_copy(update=sections), model, hardware, ranks


def named_hardware(recipe: Recipe, name: str) -> Hardware:
    """Return a device by its name for a recipe that does not name another kind.

    Raises InputError for a name that is not known, RecipeError for a contradiction.
    """
    found = hardware_module.of_name(name)
    if recipe.train.device not in ("auto", found.kind):
        text = f"{recipe.train.device!r}, but --device {name} is {found.kind}; use auto, or another --device"
        raise RecipeError(fault(recipe, "train.device", text))
    return found


def labelled_fraction(recipe: Recipe) -> float:
    """Return the share of a row's tokens for which logits are computed."""
    return 1.0 if recipe.train.objective == "clm" else recipe.train.masking_probability


def _shape_keys(recipe: Recipe, model: ModelConfig) -> dict[str, Any]:
    known = type(recipe.model).model_fields
    keys = {key: value for key, value in dataclasses.asdict(model).items() if key in known}
    if model.family != "llama":
        del keys["num_key_value_heads"]
    return keys


def _budget(recipe: Recipe, hardware: Hardware) -> int:
    """Return the bytes that one rank may hold on its device; the ranks of a machine share a CPU's memory."""
    written, ranks = recipe.memory.budget, recipe.cluster.devices_per_node
    assert ranks != "auto"
    if hardware.memory_bytes <= 0:
        if written != "auto":
            return written
        text = f"the memory of {hardware.name} cannot be read; write a size, such as 16GiB"
        raise RecipeError(fault(recipe, "memory.budget", f"auto: {text}"))
    sharing = ranks if hardware.kind == "cpu" else 1
    if written == "auto":
        return budget_bytes(hardware) // sharing
    if written > hardware.memory_bytes // sharing:
        there = format_bytes(hardware.memory_bytes // sharing)
        text = f"{format_bytes(written)} is more than the {there} of {hardware.name}" + (
            f", which {sharing} ranks share" if sharing > 1 else ""
        )
        raise RecipeError(fault(recipe, "memory.budget", f"{text}; use auto, or less", "train.device"))
    return written


def _shared(recipe: Recipe, hardware: Hardware) -> Hardware:
    """Return a CPU with the threads that each of a machine's ranks has of it, where it does not say how many."""
    ranks = recipe.cluster.devices_per_node
    if hardware.kind != "cpu" or hardware.threads is not None or ranks == "auto" or ranks == 1:
        return hardware
    return dataclasses.replace(hardware, threads=torch_threads(ranks))


UNBOUNDED_BYTES = 2**60
"""A budget for what is not trained here, and so holds less."""


def chosen_hardware(recipe: Recipe, hardware: Hardware | None = None) -> Hardware:
    """Return the hardware that a recipe is planned for: what is given, else what it names of this machine."""
    if hardware is not None:
        return hardware
    if recipe.train.device == "cpu":
        return hardware_module.cpu()
    if recipe.train.device == "cuda":
        found = hardware_module.cuda_devices()
        if found is None:
            raise RecipeError(fault(recipe, "train.device", "'cuda': this machine has no CUDA device; use cpu or auto"))
        return found
    return hardware_module.this_machine()


def _vocab_size(recipe: Recipe) -> int:
    if recipe.data.tokenizer == "train":
        return recipe.data.vocab_size
    written = recipe.model.vocab_size
    try:
        size = vocabulary_size(recipe.data.tokenizer, recipe.origin("data.tokenizer"))
    except DataError:
        if written == "auto":
            raise
        size = None  # a stored plan outlives the tokenizer's file, and preparing the data looks at it again
    if size is None and written == "auto":
        text = (
            f"{recipe.data.tokenizer} is not on this machine yet, so its size is not known; "
            "run bigtrain prepare first, or give model.vocab_size"
        )
        raise RecipeError(fault(recipe, "data.tokenizer", text))
    if size is not None and written != "auto" and written < size:
        text = f"{written} is less than the {size} tokens of {recipe.data.tokenizer}; use auto or at least {size}"
        raise RecipeError(fault(recipe, "model.vocab_size", text))
    return size if size is not None else int(written)
