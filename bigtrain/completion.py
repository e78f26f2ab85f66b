"""What a shell offers when a user asks it to complete a word: recipes, recipe keys and their words, devices. No torch.

A shell asks anew at each key press, so each function imports what it needs, and nothing else.
"""

from __future__ import annotations


def complete_recipe(incomplete: str) -> list[str]:
    """Return the shipped recipes that begin so; for a file the shell looks itself."""
    from bigtrain.config.shipped import shipped_recipes

    return [name for name in shipped_recipes() if name.startswith(incomplete)]


def complete_override(incomplete: str) -> list[str]:
    """Return the sections and keys that begin so, and after `key=` the words that this key takes."""
    from bigtrain.config.keys import choices, schema_keys

    key, equals, begun = incomplete.partition("=")
    if not equals:
        return [f"{name}=" for name in schema_keys() if name.startswith(incomplete)]
    if key not in schema_keys():
        return []
    return [f"{key}={word}" for word in map(_written, choices(key)) if word.startswith(begun)]


def complete_device(incomplete: str) -> list[str]:
    """Return the devices that begin so: this machine's processor, and those of the table."""
    from bigtrain.planner.devices import devices

    return [name for name in ("cpu", *devices()) if name.startswith(incomplete)]


def _written(value: object) -> str:
    return str(value).lower() if isinstance(value, bool) else str(value)
