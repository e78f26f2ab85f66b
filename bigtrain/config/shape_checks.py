"""What must fit together in a recipe's model section."""

from __future__ import annotations

from collections.abc import Callable, Iterator

from bigtrain.config.initial_shape import PLAN_FILE
from bigtrain.config.keys import listed
from bigtrain.config.model import ModelConfig, resolve_model
from bigtrain.config.overrides import COMMAND_LINE
from bigtrain.config.paths import local_path
from bigtrain.config.presets import PRESETS
from bigtrain.config.schema import ModelSection, Recipe
from bigtrain.errors import Fault, did_you_mean

REQUIRED_SHAPE = ("hidden_size", "num_hidden_layers", "num_attention_heads")
"""Keys that have no value without a preset."""

SEARCHED = 10_000
"""Sizes tried on either side when a divisor is looked for."""


Check = Callable[[Recipe, ModelConfig], Iterator[Fault]]


def shape_faults(recipe: Recipe, *more: Check) -> list[Fault]:
    """Return what is wrong with the shape of the model, alone and for the data and the mechanisms it is given.

    `more` are checks of a recipe and its shape beside those of this module.
    """
    if faults := [*_preset_faults(recipe), *_missing_shape(recipe)]:
        return faults
    shape = resolve_model(recipe.model, vocab_size=recipe.data.vocab_size, sequence_length=recipe.data.sequence_length)
    checks = (_heads, _llama_only, _positions, _vocabulary, _policies, *more)
    return [fault for check in checks for fault in check(recipe, shape)]


def _preset_faults(recipe: Recipe) -> Iterator[Fault]:
    preset, family = recipe.model.preset, recipe.model.family
    if preset is None:
        return
    if preset not in PRESETS:
        hint = did_you_mean(preset, PRESETS) or f"; there are {listed(PRESETS, 'and')}"
        yield fault(recipe, "model.preset", f"unknown preset {preset!r}{hint}")
    elif PRESETS[preset]["family"] != family:
        others = [name for name, keys in PRESETS.items() if keys["family"] == family]
        text = f"{preset!r} is of the family {PRESETS[preset]['family']!r}, not {family!r}"
        yield fault(recipe, "model.preset", f"{text}, which has {listed(others, 'and')}")


def _missing_shape(recipe: Recipe) -> Iterator[Fault]:
    if recipe.model.preset is None:
        for key in REQUIRED_SHAPE:
            if getattr(recipe.model, key) is None:
                text, source = "missing; without a preset the shape must be written out", recipe.train.init_from
                if source is not None:
                    text = f"missing, and {source} has no plan.yaml to take it from; import that folder first"
                yield fault(recipe, f"model.{key}", text)


def _heads(recipe: Recipe, shape: ModelConfig) -> Iterator[Fault]:
    width, heads, groups = shape.hidden_size, shape.num_attention_heads, shape.num_key_value_heads
    if width % heads:
        text = f"{heads} does not divide hidden_size, {width}; nearest that do: {nearest_divisors(width, heads)}"
        yield fault(recipe, "model.num_attention_heads", text, "model.hidden_size")
    elif shape.family == "llama" and shape.head_dim % 2:
        text = f"{heads} heads of {width} are {shape.head_dim} wide, and rotary positions need an even width"
        yield fault(recipe, "model.num_attention_heads", text, "model.hidden_size")
    if shape.family == "llama" and heads % groups:
        near = nearest_divisors(heads, groups)
        text = f"{groups} does not divide num_attention_heads, {heads}; nearest that do: {near}"
        yield fault(recipe, "model.num_key_value_heads", text, "model.num_attention_heads")


def _llama_only(recipe: Recipe, shape: ModelConfig) -> Iterator[Fault]:
    if shape.family == "llama":
        return
    groups, heads = recipe.model.num_key_value_heads, shape.num_attention_heads
    if groups not in (None, heads):
        text = f"{groups}: only the family llama groups heads; leave it out or write {heads}"
        yield fault(recipe, "model.num_key_value_heads", text)
    if recipe.model.rope_theta != ModelSection.model_fields["rope_theta"].default:
        text = f"only the family llama has rotary positions; leave it out for {shape.family}"
        yield fault(recipe, "model.rope_theta", text)


def _positions(recipe: Recipe, shape: ModelConfig) -> Iterator[Fault]:
    length, positions = recipe.data.sequence_length, shape.max_position_embeddings
    if length > positions:
        text = f"{length} is longer than model.max_position_embeddings, {positions}"
        text += "; shorten the rows"
        text += "" if _is_taken_over(recipe, "max_position_embeddings") else " or write auto there"
        yield fault(recipe, "data.sequence_length", text, "model.max_position_embeddings")


def _vocabulary(recipe: Recipe, shape: ModelConfig) -> Iterator[Fault]:
    trained = recipe.data.vocab_size
    if recipe.data.tokenizer == "train" and shape.vocab_size < trained:
        text = f"{shape.vocab_size} is smaller than the tokenizer's data.vocab_size, {trained}"
        if _is_taken_over(recipe, "vocab_size"):
            text += f"; name the tokenizer of {recipe.train.init_from} in data.tokenizer, or train a smaller one"
        else:
            text += f"; use auto or at least {trained}"
        yield fault(recipe, "model.vocab_size", text, "data.vocab_size")


def _is_taken_over(recipe: Recipe, key: str) -> bool:
    """Tell whether a key of the shape came with the weights that the run starts from."""
    source = recipe.train.init_from
    return source is not None and recipe.origin(f"model.{key}") == str(local_path(source) / PLAN_FILE)


def _policies(recipe: Recipe, shape: ModelConfig) -> Iterator[Fault]:
    policy, blocks = recipe.recompute.policy, shape.num_hidden_layers
    if isinstance(policy, list) and len(policy) != blocks:
        text = f"a list of {len(policy)} for {blocks} blocks; write one entry a block, or one word for all"
        yield fault(recipe, "recompute.policy", text, "model.num_hidden_layers")


def fault(recipe: Recipe, key: str, text: str, *involved: str) -> Fault:
    """Return a fault at the place of its key, or of the first involved key that an override or the file has set.

    What was typed last is shown first: an override of any key that is involved is what made the fault.
    """
    places = [recipe.origin(name) for name in (key, *involved) if recipe.writes(name)]
    typed = [place for place in places if place == COMMAND_LINE]
    return Fault((typed or places or [recipe.origin(key)])[0], key, text)


def nearest_divisors(number: int, wanted: int) -> str:
    """Return the nearest divisors of a number, at or below and above what was wanted, as text: "4, 8".

    Both are searched for near the wanted size alone: far from it they are no help.
    """
    down = range(min(wanted, number), max(0, wanted - SEARCHED), -1)
    up = range(wanted + 1, min(number, wanted + SEARCHED) + 1)
    found = [next((size for size in sizes if number % size == 0), None) for sizes in (down, up)]
    return ", ".join(str(size) for size in found if size)
