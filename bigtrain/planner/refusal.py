"""What to say when nothing fits: by how much, the least that would, and the cheapest change. No torch."""

from __future__ import annotations

from collections.abc import Iterator

from bigtrain.config.keys import show
from bigtrain.config.schema import Recipe
from bigtrain.config.shape_checks import fault
from bigtrain.errors import DoesNotFit
from bigtrain.memory.compose import runs_of
from bigtrain.models.shape import loss_chunk_tokens
from bigtrain.planner.candidates import settings
from bigtrain.planner.choice import Choice
from bigtrain.planner.mechanisms import mechanism_faults
from bigtrain.planner.offers import Offers, changed
from bigtrain.planner.price import memory_of
from bigtrain.planner.ranking import closest, device_bytes, fastest, last_resort, mix_spaces
from bigtrain.units import BYTE_UNITS, exact_bytes, parse_bytes

RELEASED = (
    "recompute.policy",
    "train.micro_batch_size",
    "sharding.zero_stage",
    "sharding.replicate",
    "optimizer.gradient_release",
    "optimizer.state",
    "amp.master_weights",
    "sharding.offload",
)
"""Keys that are left open one at a time to see what would fit, the cheapest first: those that cost nothing but time,
those that change numbers, those that move data to the host. After them, shorter rows."""

PLAIN = {
    "recompute.policy": "none",
    "sharding.zero_stage": "0",
    "optimizer.gradient_release": "false",
    "optimizer.state": "fp32",
    "amp.master_weights": "fp32",
    "sharding.offload": "none",
}
"""What goes without saying."""

COARSER = {"optimizer.state": ("bf16", "8bit", "4bit"), "amp.master_weights": ("split24", "none")}
"""Values of keys that change numbers, tried one after another: the first that fits changes them least."""

LEAST_SEQUENCE_LENGTH = 32
"""Shorter rows are not proposed."""


def refused(offers: Offers) -> DoesNotFit:
    """Return the error for a recipe whose choices are all over the budget."""
    choice = closest(offers)
    budget, needed = offers.budget_bytes, _smallest_budget(offers, choice)
    change = _cheapest_change(offers) or _more_memory(offers, needed)
    mix = " + ".join(f"{count} {policy}" for policy, count in runs_of(choice.recompute))
    values = [(key, mix if value == "auto" else value) for key, value in _values(offers.recipe, choice)]
    open_keys = [f"{key}={value}" for key, value in values]
    with_what = f", with {' and '.join(open_keys)}" if open_keys else ""
    text = (
        f"{_shown(budget)} is {rounded_up(needed - budget)} less than the least this recipe needs "
        f"({rounded_up(needed)}{with_what}); {change} would fit"
    )
    where = fault(offers.recipe, "memory.budget", text, "train.device")
    return DoesNotFit(where, over_bytes=needed - budget, change=change)


def rounded_up(size_bytes: int) -> str:
    """Return a size of three digits or more that is no less, as a recipe writes it: 15.41GiB."""
    unit = next((name for name in ("GiB", "MiB", "KiB") if size_bytes >= BYTE_UNITS[name]), "KiB")
    hundredths = -(-size_bytes * 100 // BYTE_UNITS[unit])
    text = f"{hundredths // 100}.{hundredths % 100:02d}{unit}"
    return text if parse_bytes(text) >= size_bytes else f"{(hundredths + 1) // 100}.{(hundredths + 1) % 100:02d}{unit}"


def _shown(size_bytes: int) -> str:
    exact = exact_bytes(size_bytes)
    return exact if exact.endswith("iB") else rounded_up(size_bytes)


def _more_memory(offers: Offers, needed_bytes: int) -> str:
    """Return the budget that would do, if the device has that much, else what to look for."""
    there, size = offers.hardware.memory_bytes, rounded_up(needed_bytes)
    return f"only a device of {size}, or more ranks," if 0 < there < needed_bytes else f"memory.budget={size}"


def _smallest_budget(offers: Offers, choice: Choice) -> int:
    """Return a budget in which a choice fits: with a larger one, the loss may hold more logits at once."""
    rows, kind, budget = offers.model.padded_vocab_size, offers.hardware.kind, offers.budget_bytes
    while True:
        recipe = changed(choice.into(offers.recipe), "memory.budget", budget)
        needed = device_bytes(memory_of(recipe, offers.model, offers.hardware, offers.world_size))
        if needed <= budget:
            return budget
        larger = parse_bytes(rounded_up(needed))
        if loss_chunk_tokens(rows, kind, larger) == loss_chunk_tokens(rows, kind, budget):
            return larger
        budget = larger


def _cheapest_change(offers: Offers) -> str | None:
    """Return the first change of one key that makes something fit, as an override, or None."""
    for key, recipe in _changes(offers):
        other = Offers(recipe, offers.model, offers.hardware, offers.world_size)
        if last_resort(other) is None:
            continue
        if (found := fastest(other)) is not None:
            return f"{key}={_value(found.choice.into(recipe), key)}"
    return None


def _changes(offers: Offers) -> Iterator[tuple[str, Recipe]]:
    """Yield recipes with one key open that was written, if that leaves more choices, and then with shorter rows."""
    recipe = offers.recipe
    for key in RELEASED:
        for value in COARSER.get(key, ("auto",)):
            tried = changed(recipe, key, value)
            if _space(offers, changed(recipe, key, "auto")) != _space(offers, recipe) and _possible(offers, tried):
                yield key, tried
    length = recipe.data.sequence_length // 2
    while length >= LEAST_SEQUENCE_LENGTH:
        yield "data.sequence_length", changed(recipe, "data.sequence_length", length)
        length //= 2


def _possible(offers: Offers, recipe: Recipe) -> bool:
    return not mechanism_faults(recipe, offers.hardware, 1, offers.world_size)


def _space(offers: Offers, recipe: Recipe) -> tuple[object, ...]:
    blocks = offers.model.num_hidden_layers
    return settings(recipe, offers.hardware, offers.world_size), mix_spaces(recipe, blocks, offers.hardware)


def _values(recipe: Recipe, choice: Choice) -> Iterator[tuple[str, str]]:
    """Yield the keys that a recipe leaves open with what the choice has there, as overrides write it.

    A mix of policies would say less than `auto`; what a plain run has anyhow goes without saying.
    """
    for key in RELEASED:
        value = _value(choice.into(recipe), key)
        plain = PLAIN.get(key) == value or (key == "sharding.replicate" and not choice.zero_stage)
        if _value(recipe, key) == "auto" and not plain:
            yield key, value


def _value(recipe: Recipe, key: str) -> str:
    section, _, name = key.partition(".")
    value = getattr(getattr(recipe, section), name)
    return "auto" if isinstance(value, list) else show(key, value).strip("'")
