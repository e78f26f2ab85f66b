"""A step's allocations and releases, written down: for the allocator's replay, and to be looked at. No torch."""

from __future__ import annotations

from collections import Counter
from dataclasses import dataclass, field
from itertools import pairwise

from bigtrain.memory.report import CAUSES

POINTS = 600
"""A timeline to be looked at has no more of them: a screen shows no more."""

END = "end"
"""The mark of where the last step ends."""


@dataclass
class Events:
    """Allocations and releases as the allocator's replay reads them.

    `phase` is what the step does now (forward, backward, update); `marks` are the numbers of events before which
    something begins, by name.
    """

    events: list[int] = field(default_factory=list)
    phase: str = ""
    marks: dict[str, int] = field(default_factory=dict)
    allocations: int = 0

    def allocate(self, size: int, cause: str, place: str) -> int:
        """Note an allocation and return its number."""
        number = self.allocations
        self.allocations = number + 1
        self.events.append(size)
        return number

    def release(self, number: int) -> None:
        """Note the release of an allocation."""
        self.events.append(~number)

    def mark(self, name: str) -> None:
        """Note that something begins here."""
        self.marks[name] = len(self.events)


@dataclass
class Recording(Events):
    """Events, and of each allocation its size, its cause, the place that made it and the phase in which."""

    sizes: list[int] = field(default_factory=list)
    causes: list[str] = field(default_factory=list)
    places: list[str] = field(default_factory=list)
    phases: list[str] = field(default_factory=list)

    def allocate(self, size: int, cause: str, place: str) -> int:
        """Note an allocation and return its number."""
        self.sizes.append(size)
        self.causes.append(cause)
        self.places.append(place)
        self.phases.append(self.phase)
        return super().allocate(size, cause, place)

    def timeline(self, since: str, points: int = POINTS) -> dict[str, object]:
        """Return the bytes alive by cause after events since a mark, in columns: `time` 0 to 1, `causes`, `label`.

        It goes up to the mark END, where there is one: what is let go of later belongs to no step.

        Of many events, those are kept that hold the most in their stretch, so the peak is always among them.
        """
        rows = self._rows()[self.marks[since] : self.marks.get(END)]
        kept = thinned([sum(row[0].values()) for row in rows], points)
        return {
            "time": [index / max(1, len(rows) - 1) for index in kept],
            "causes": {cause: [rows[index][0][cause] for index in kept] for cause in CAUSES},
            "label": [rows[index][1] for index in kept],
        }

    def places_at_peak(self, since: str) -> dict[str, int]:
        """Return the bytes alive at the peak since a mark, by the place that allocated them."""
        alive: Counter[str] = Counter()
        now = most = 0
        found: dict[str, int] = {}
        number = 0
        for index, event in enumerate(self.events):
            if event >= 0:
                alive[self.places[number]] += event
                now, number = now + event, number + 1
            else:
                alive[self.places[~event]] -= self.sizes[~event]
                now -= self.sizes[~event]
            if index >= self.marks[since] and now > most:
                most, found = now, dict(alive)
        return {place: size for place, size in found.items() if size}

    def _rows(self) -> list[tuple[dict[str, int], str]]:
        """Return what is alive after each event by cause, and where and in what phase the last allocation was made."""
        alive = dict.fromkeys(CAUSES, 0)
        rows, number, label = [], 0, ""
        for event in self.events:
            if event >= 0:
                alive[self.causes[number]] += event
                label, number = f"{self.places[number]} {self.phases[number]}".strip(), number + 1
            else:
                alive[self.causes[~event]] -= self.sizes[~event]
            rows.append((dict(alive), label))
        return rows


def thinned(totals: list[int], points: int) -> list[int]:
    """Return indexes of at most so many values, the greatest of each stretch, in order."""
    if len(totals) <= points:
        return list(range(len(totals)))
    ends = [len(totals) * stretch // points for stretch in range(points + 1)]
    return [max(range(begin, end), key=totals.__getitem__) for begin, end in pairwise(ends)]
