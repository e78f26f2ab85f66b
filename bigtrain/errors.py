"""What can go wrong, as types, and the one-line form in which users read it.

    BigtrainError
      InputError          the user's input is wrong: exit 2, one line for each fault
        RecipeError         the recipe or an override
        DataError           a corpus, a tokenizer, a shard
        CheckpointError     a checkpoint that is absent, damaged or of another model
          ResumeError         a run folder of another recipe
      DoesNotFit          over the memory budget: exit 3
      Interrupted         stopped by a signal after a checkpoint: exit 75
"""

from __future__ import annotations

import difflib
from collections.abc import Iterable, Sequence
from typing import NamedTuple


class Fault(NamedTuple):
    """One thing that is wrong: where it stands, the key it concerns, what is wrong and what to do instead."""

    where: str
    key: str
    text: str

    def __str__(self) -> str:
        return ": ".join(part for part in self if part)


class BigtrainError(Exception):
    """The root of everything that bigtrain raises on purpose."""

    exit_code = 1


class InputError(BigtrainError, ValueError):
    """The user's input is wrong; `faults` holds every fault that was found."""

    exit_code = 2

    def __init__(self, *faults: Fault | str) -> None:
        self.faults = tuple(Fault("", "", fault) if isinstance(fault, str) else fault for fault in faults)
        super().__init__("\n".join(map(str, self.faults)))


class RecipeError(InputError):
    """A recipe or an override that cannot be used."""


class DataError(InputError):
    """A corpus, a tokenizer or a shard that cannot be used."""


class CheckpointError(InputError):
    """A checkpoint that is absent, damaged or belongs to another model."""


class ResumeError(CheckpointError):
    """A run folder that holds the run of another recipe."""


class DoesNotFit(BigtrainError):
    """The run needs more memory than its budget."""

    exit_code = 3


class Interrupted(BigtrainError):
    """Stopped by a signal; a verified checkpoint is there to go on from."""

    exit_code = 75


def did_you_mean(word: str, known: Iterable[str]) -> str:
    """Return `"; did you mean 'x'?"` for the nearest of the known words, or an empty text when none is near."""
    nearest = nearest_word(word, list(known))
    return f"; did you mean {nearest!r}?" if nearest else ""


def nearest_word(word: str, known: Sequence[str]) -> str | None:
    """Return the known word nearest to this one, spelling, case and underscores aside, or None."""
    folded = {_fold(name): name for name in known}
    matches = difflib.get_close_matches(_fold(word), folded, n=1, cutoff=0.6)
    return folded[matches[0]] if matches else None


def _fold(word: str) -> str:
    return word.lower().replace("-", "").replace("_", "")
