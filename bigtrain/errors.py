"""What can go wrong, as types, and the one-line form in which users read it.

BigtrainError
  InputError          the user's input is wrong: exit 2, one line for each fault
    RecipeError         the recipe or an override
    DataError           a corpus, a tokenizer, a shard
    CheckpointError     a checkpoint that is absent, damaged or of another model
      NewerFormat         a checkpoint that a later bigtrain wrote
      ResumeError         a run folder of another recipe
  DoesNotFit          over the memory budget: exit 3
  OutOfMemory         in the middle of a run, whatever was predicted: exit 1
  NonFiniteGradient   found after gradient release had updated other weights: exit 1
  Interrupted         stopped by a signal after a checkpoint: exit 75
    NodesChanged        stopped to go on with other nodes: the agent starts it again
"""

from __future__ import annotations

import sys
from collections.abc import Iterable
from difflib import SequenceMatcher
from typing import NamedTuple

LONGEST_WORD = 64
"""Longer words get no suggestion: the search takes time by the product of lengths, and no key is near them."""


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

    def report(self) -> int:
        """Print the error for the user, a line a fault, on standard error; return the process's exit code."""
        for line in str(self).splitlines():
            print(f"error: {line}", file=sys.stderr)
        return self.exit_code


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


class NewerFormat(CheckpointError):
    """A checkpoint that a later bigtrain wrote; never passed over for an older one, which would lose steps."""


class ResumeError(CheckpointError):
    """A run folder that holds the run of another recipe."""


class DoesNotFit(BigtrainError):
    """The run needs more memory than its budget, by `over_bytes`; `change` is the cheapest override that would fit."""

    exit_code = 3

    def __init__(self, fault: Fault | str, *, over_bytes: int = 0, change: str = "") -> None:
        self.over_bytes, self.change = over_bytes, change
        super().__init__(str(fault))


class OutOfMemory(BigtrainError):
    """Memory ran out in a step; the lines say who holds it and what would fit."""


class NonFiniteGradient(BigtrainError):
    """A gradient was not finite, and other weights of that step were updated already."""


class Interrupted(BigtrainError):
    """Stopped by a signal; a verified checkpoint is there to go on from."""

    exit_code = 75


class NodesChanged(Interrupted):
    """Stopped after a checkpoint because nodes come or go; only the agent that starts it again sees the exit code."""

    exit_code = 76

    def report(self) -> int:
        """Print what happens, which is no error; return the code for the agent."""
        print(self, flush=True)
        return self.exit_code


def did_you_mean(word: str, known: Iterable[str]) -> str:
    """Return `"; did you mean 'x'?"` for the nearest of the known words, or an empty text when none is near."""
    nearest = nearest_word(word, known)
    return f"; did you mean {nearest!r}?" if nearest else ""


def nearest_word(word: str, known: Iterable[str], *, likeness: float = 0.6) -> str | None:
    """Return the known word nearest to this one, spelling, case and underscores aside, or None.

    Near is one edit away, or of a difflib ratio of at least `likeness`.
    """
    if len(word) > LONGEST_WORD:
        return None
    wanted = _fold(word)
    scores = []
    for name in known:
        folded = _fold(name)
        edits, ratio = edit_distance(wanted, folded), SequenceMatcher(None, wanted, folded).ratio()
        if (edits <= 1 and len(wanted) > 2) or ratio >= likeness:
            scores.append((edits, -ratio, name))
    return min(scores)[2] if scores else None


def edit_distance(left: str, right: str) -> int:
    """Count the letters to put in, leave out, replace or swap with their neighbour on the way from left to right.

    Optimal string alignment: Boytsov, "Indexing methods for approximate dictionary searching", 2011, section 2.2.1.
    """
    above: list[int] = []
    row = list(range(len(right) + 1))
    for i, a in enumerate(left):
        two_above, above, row = above, row, [i + 1]
        for j, b in enumerate(right):
            row.append(min(above[j + 1] + 1, row[j] + 1, above[j] + (a != b)))
            if i and j and a == right[j - 1] and left[i - 1] == b:
                row[-1] = min(row[-1], two_above[j - 1] + 1)
    return row[-1]


def _fold(word: str) -> str:
    return word.lower().replace("-", "").replace("_", "")
