"""What of a state is not a tensor: `state.json` of a checkpoint, read as strictly as if a stranger had written it."""

from __future__ import annotations

import math
from collections.abc import Callable
from pathlib import Path
from typing import Any

from bigtrain import strict_json
from bigtrain.errors import CheckpointError

LARGEST = 2**60
"""Of steps, tokens and rows."""


def read_counts(path: Path) -> dict[str, Any]:
    """Return a checkpoint's state.json. Raises CheckpointError for one that no run has written."""
    try:
        found = strict_json.read(path)
    except (OSError, ValueError) as error:
        raise CheckpointError(f"{path}: damaged: {error}") from error
    if not isinstance(found, dict):
        raise CheckpointError(f"{path}: damaged: not the state of a run")
    for key, fits in _KEYS.items():
        if not fits(found.get(key)):
            raise CheckpointError(f"{path}: damaged: no {key} can be {repr(found.get(key))[:60]}")
    return found


def _is_count(value: object) -> bool:
    return type(value) is int and 0 <= value < LARGEST


def _is_number(value: object) -> bool:
    return isinstance(value, (int, float)) and (
        abs(value) < LARGEST if isinstance(value, int) else math.isfinite(value)
    )


def _is_scale(value: object) -> bool:
    return isinstance(value, dict) and all(_is_number(value.get(key)) for key in ("scale", "good_steps"))


def _is_place(value: object) -> bool:
    return isinstance(value, dict) and _is_count(value.get("row")) and isinstance(value.get("corpus"), str)


def _are_counters(value: object) -> bool:
    return isinstance(value, dict) and all(map(_is_number, value.values()))


def _are_notes(value: object) -> bool:
    """Tell whether these can be what the loop remembers: subjects that it knows, of each what it writes."""
    if value is None:
        return True
    return isinstance(value, dict) and all(
        subject in _NOTES and isinstance(kept, dict) and all(_is_note(_NOTES[subject], *item) for item in kept.items())
        for subject, kept in value.items()
    )


def _is_note(known: dict[str, Callable[[object], bool]], name: str, value: object) -> bool:
    return name in known and known[name](value)


def _are(fits: Callable[[object], bool]) -> Callable[[object], bool]:
    return lambda value: isinstance(value, list) and all(map(fits, value))


_NOTES: dict[str, dict[str, Callable[[object], bool]]] = {
    "attention": {"kernel": lambda value: isinstance(value, str)},
    "skips": {"total": _is_count, "in_a_row": _is_count},
    "spikes": {
        "losses": _are(_is_number),
        "rollbacks": _is_count,
        "beyond": _is_count,
        "left_out": _are(_are(_is_count)),
    },
}


def _is_absent_or(kind: type) -> Callable[[object], bool]:
    return lambda value: value is None or isinstance(value, kind)


_KEYS: dict[str, Callable[[object], bool]] = {
    "step": _is_count,
    "tokens": _is_count,
    "loader": _is_place,
    "loss_scale": _is_scale,
    "optimizer": _are_counters,
    "optimizer_class": lambda value: isinstance(value, str),
    "optimizer_format": _is_absent_or(str),
    "notes": _are_notes,
}
