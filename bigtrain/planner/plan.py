"""From a recipe to a plan: the same recipe with no `auto` left, and what is known exactly before it runs."""

from __future__ import annotations

import dataclasses
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

from bigtrain import units
from bigtrain.config.dump import to_yaml
from bigtrain.config.model import ModelConfig, resolve_model
from bigtrain.config.schema import Recipe
from bigtrain.data.vocabulary import vocabulary_size
from bigtrain.errors import DataError, Fault, RecipeError
from bigtrain.memory.predict import model_state
from bigtrain.models import shape
from bigtrain.planner import hardware as hardware_module
from bigtrain.planner import mechanisms
from bigtrain.planner.hardware import Hardware
from bigtrain.planner.mechanisms import instead_of_auto

MICRO_BATCH_TOKENS = {"cpu": 4096, "cuda": 16384}
"""What `micro_batch_size: auto` aims at: more tokens at once make a device no faster, and cost activations."""


@dataclass(frozen=True)
class Plan:
    """A recipe in which nothing is open, and what follows from it.

    `flops_per_token` counts forward and backward without recomputation; `state_bytes` are what a rank holds between
    forward and optimizer step, by cause; activations come on top.
    """

    recipe: Recipe
    model: ModelConfig
    hardware: Hardware
    world_size: int
    micro_batch_size: int
    accumulation_steps: int
    parameters: int
    flops_per_token: int
    state_bytes: Mapping[str, int]

    @property
    def total_steps(self) -> int | None:
        """Return the length of the run in steps; None when it is given in epochs and the data are not counted yet."""
        train = self.recipe.train
        if train.tokens is not None:
            return -(-train.tokens // (train.global_batch_size * self.recipe.data.sequence_length))
        return train.steps

    @property
    def loss_chunk_tokens(self) -> int:
        """Return how many positions' logits the loss may hold at a time."""
        budget = self.recipe.memory.budget
        assert budget != "auto"
        return shape.loss_chunk_tokens(self.model.padded_vocab_size, self.hardware.kind, budget)

    @property
    def held_bytes(self) -> dict[str, int]:
        """Return the bytes of model state by cause, without the causes that hold nothing."""
        return {cause: size for cause, size in self.state_bytes.items() if size}

    @property
    def warnings(self) -> tuple[str, ...]:
        """Return what is allowed and probably not wanted, each with what to do instead."""
        return tuple(mechanisms.warnings(self.recipe, self.hardware, self.model.initializer_range))

    def with_rows(self, rows: int) -> Plan:
        """Return the plan with `epochs` turned into steps, now that an epoch is known to have so many rows.

        Raises RecipeError if the warm-up turns out to be longer than the run.
        """
        train = self.recipe.train
        if train.epochs is None:
            return self
        steps = max(1, round(train.epochs * rows / train.global_batch_size))
        warmup = self.recipe.optimizer.warmup_steps
        if isinstance(warmup, int) and warmup > steps:
            text = f"{warmup} steps of warm-up are longer than the run of {steps}; write a share such as 6%"
            raise _fault(self.recipe, "optimizer.warmup_steps", text)
        train = train.model_copy(update={"epochs": None, "steps": steps})
        return dataclasses.replace(self, recipe=self.recipe.model_copy(update={"train": train}))

    def to_yaml(self) -> str:
        """Return the plan as a recipe, its predictions as comments."""
        comments = {
            "model": f"{units.format_count(self.parameters)} parameters, "
            f"{units.format_flops(self.flops_per_token)} per token, forward and backward",
            "train": f"{self.accumulation_steps} micro-batches per step and rank",
            "memory": "; ".join(f"{cause} {units.format_bytes(size)}" for cause, size in self.held_bytes.items()),
        }
        return to_yaml(self.recipe, comments=comments)


def plan(recipe: Recipe, hardware: Hardware | None = None) -> Plan:
    """Resolve a recipe for some hardware, this machine's by default.

    Raises RecipeError where the recipe asks for what is not there.
    """
    hardware = _chosen_hardware(recipe, hardware)
    model = resolve_model(recipe.model, vocab_size=_vocab_size(recipe), sequence_length=recipe.data.sequence_length)
    world_size = 1
    rank_rows = recipe.train.global_batch_size // world_size
    micro = recipe.train.micro_batch_size
    if micro == "auto":
        micro = _largest_divisor(rank_rows, MICRO_BATCH_TOKENS[hardware.kind] // recipe.data.sequence_length)
    accumulation_steps = rank_rows // micro
    if faults := mechanisms.mechanism_faults(recipe, hardware, accumulation_steps):
        raise RecipeError(*faults)
    resolved = _resolve(recipe, model, hardware, micro, accumulation_steps)
    return Plan(
        recipe=resolved,
        model=model,
        hardware=hardware,
        world_size=world_size,
        micro_batch_size=micro,
        accumulation_steps=accumulation_steps,
        parameters=shape.parameters(model),
        flops_per_token=shape.flops_per_token(model, recipe.data.sequence_length, labelled_fraction(recipe)),
        state_bytes=model_state(resolved, model, accumulated=accumulation_steps > 1),
    )


def labelled_fraction(recipe: Recipe) -> float:
    """Return the share of a row's tokens for which logits are computed."""
    return recipe.train.masking_probability if recipe.train.objective == "mlm" else 1.0


def _chosen_hardware(recipe: Recipe, hardware: Hardware | None) -> Hardware:
    if hardware is not None:
        return hardware
    if recipe.train.device == "cpu":
        return hardware_module.cpu()
    if recipe.train.device == "cuda":
        found = hardware_module.cuda_devices()
        if found is None:
            raise _fault(recipe, "train.device", "'cuda': this machine has no CUDA device; use cpu or auto")
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
        raise _fault(recipe, "data.tokenizer", text)
    if size is not None and written != "auto" and written < size:
        text = f"{written} is less than the {size} tokens of {recipe.data.tokenizer}; use auto or at least {size}"
        raise _fault(recipe, "model.vocab_size", text)
    return size if size is not None else int(written)


def _largest_divisor(number: int, limit: int) -> int:
    return next(size for size in range(max(1, min(number, limit)), 0, -1) if number % size == 0)


def _resolve(
    recipe: Recipe, model: ModelConfig, hardware: Hardware, micro_batch_size: int, accumulation_steps: int
) -> Recipe:
    """Put a value wherever the recipe says `auto`."""
    budget = hardware.memory_bytes if recipe.memory.budget == "auto" else recipe.memory.budget
    shape_keys = {
        key: value for key, value in dataclasses.asdict(model).items() if key in type(recipe.model).model_fields
    }
    if model.family != "llama":
        del shape_keys["num_key_value_heads"]
    chosen: dict[str, dict[str, Any]] = {
        "model": shape_keys,
        "train": {
            "micro_batch_size": micro_batch_size,
            "device": hardware.kind,
            **instead_of_auto(recipe.train, compile=hardware.kind == "cuda"),
        },
        **mechanisms.resolved_mechanisms(recipe, accumulation_steps),
        "sharding": instead_of_auto(recipe.sharding, engine="fsdp2", zero_stage=0, replicate=1, offload="none"),
        "memory": {"budget": budget},
        "cluster": instead_of_auto(recipe.cluster, devices_per_node=1),
    }
    sections = {name: getattr(recipe, name).model_copy(update=keys) for name, keys in chosen.items()}
    return recipe.model_copy(update=sections)


def _fault(recipe: Recipe, key: str, text: str) -> RecipeError:
    return RecipeError(Fault(recipe.origin(key), key, text))
