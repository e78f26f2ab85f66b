"""A recipe in the making: each line with where it came from, what means something else here, and what has no place."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass, field

from bigtrain.config.checks import recipe_faults
from bigtrain.config.dump import write_value
from bigtrain.config.keys import schema_keys
from bigtrain.config.load import read_recipe
from bigtrain.config.presets import PRESETS
from bigtrain.errors import Fault, InputError, RecipeError, did_you_mean
from bigtrain.translation.source import Source
from bigtrain.translation.tables import Row, asks_for_something, row_of

PLACEHOLDER = "placeholder: write yours"
STAND_IN_MODEL, STAND_IN_STEPS, STAND_IN_RATE = "gpt2-124m", 1000, 1e-4


@dataclass
class Draft:
    """The lines of a recipe by dotted key, each a value and its origin; and what is to be told beside them."""

    title: str
    lines: dict[str, tuple[object, str]] = field(default_factory=dict)
    changes: list[str] = field(default_factory=list)
    missing: list[str] = field(default_factory=list)

    @classmethod
    def started(cls, title: str, preset: str | None) -> Draft:
        """Return a recipe of a model of a preset, or a placeholder; of placeholders for what nobody else says."""
        if preset is not None and preset not in PRESETS:
            near = did_you_mean(preset, PRESETS) or f"; there are {', '.join(PRESETS)}"
            raise InputError(f"command line: --model: unknown preset {preset!r}{near}")
        draft, family = cls(title), PRESETS[preset or STAND_IN_MODEL]["family"]
        origin = PLACEHOLDER if preset is None else f"--model {preset}"
        draft.put("model.family", family, origin)
        draft.put("model.preset", preset or STAND_IN_MODEL, origin)
        draft.put("data.source", "embedded", PLACEHOLDER)
        draft.put("data.sequence_length", 512, PLACEHOLDER)
        draft.put("train.objective", "mlm" if family == "bert" else "clm", f"what {family} learns")
        draft.put("train.steps", STAND_IN_STEPS, PLACEHOLDER)
        draft.put("optimizer.learning_rate", STAND_IN_RATE, PLACEHOLDER)
        return draft

    def put(self, key: str, value: object, origin: str) -> None:
        """Write a line, over an earlier one; the length of a run is given once."""
        if key in ("train.steps", "train.epochs"):
            self.lines = {k: line for k, line in self.lines.items() if k not in ("train.steps", "train.epochs")}
        self.lines[key] = (value, origin)

    def is_placeholder(self, key: str) -> bool:
        """Tell whether a line stands for what only the user knows."""
        return key in self.lines and self.lines[key][1] == PLACEHOLDER

    def change(self, key: str, text: str) -> None:
        """Note that a key of theirs means something else here."""
        self.changes.append(f"{key}: {text}")

    def lack(self, key: str, text: str) -> None:
        """Note a key of theirs that has no counterpart."""
        self.missing.append(f"{key}: {text}")

    def leave_out(self, source: Source, table: tuple[Row, ...], quiet: tuple[str, ...] = ()) -> None:
        """Note what a configuration says and no line holds: one note for each row of the table, or unknown key."""
        known = [key for row in table for key in row.keys if "*" not in key]
        rows: dict[Row, list[str]] = {}
        for key, value in source.values.items():
            row = row_of(table, key)
            if key in source.read or (row is None and _is_quiet(key, quiet)):
                continue
            if row is None:
                self.lack(key, f"unknown{did_you_mean(key, known)}")
            elif asks_for_something(row, value):
                rows.setdefault(row, []).append(key)
        for row, keys in rows.items():
            self.lack(", ".join(keys), row.note)

    def text(self) -> str:
        """Return the recipe, each line with its origin, and below it what is to be told."""
        return "\n".join([f"# {self.title}", *self._sections(), *self._told()]) + "\n"

    def notes(self) -> list[str]:
        """Return what is to be told beside the lines, in lines."""
        found = [f"means something else here: {note}" for note in self.changes]
        return [*found, *(f"no counterpart: {note}" for note in self.missing)]

    def check(self, where: str) -> None:
        """Raise RecipeError for values that no recipe can have, telling from where they came."""
        try:
            faults = recipe_faults(read_recipe(self.text().encode(), where))
        except RecipeError as error:
            faults = list(error.faults)
        if faults:
            told = [Fault(where, self._origin(fault.key), f"{fault.key}: {fault.text}") for fault in faults]
            raise RecipeError(*told)

    def _origin(self, key: str) -> str:
        return self.lines[key][1] if key in self.lines else ""

    def _sections(self) -> Iterator[str]:
        section = ""
        for key in schema_keys():
            if key not in self.lines:
                continue
            head, _, name = key.rpartition(".")
            if head != section:
                section = head
                yield f"\n{head}:"
            value, origin = self.lines[key]
            yield f"{'  ' if head else ''}{name}: {write_value(value)}  # {_printable(origin)}"

    def _told(self) -> Iterator[str]:
        for title, notes in (("Means something else here", self.changes), ("No counterpart", self.missing)):
            if notes:
                yield f"\n# {title}:"
                yield from (f"# - {_printable(note)}" for note in notes)


def _is_quiet(key: str, quiet: tuple[str, ...]) -> bool:
    name = key.partition(".")[0]
    return any(name == word or (word.endswith("*") and name.startswith(word[:-1])) for word in quiet)


def _printable(text: str) -> str:
    return text if text.isprintable() else ascii(text)
