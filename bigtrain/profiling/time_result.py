"""Where the time of a step goes: measured beside predicted, by class, and what to look at next."""

from __future__ import annotations

import statistics
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from bigtrain.charts.axis import short_seconds
from bigtrain.charts.elements import words
from bigtrain.planner.by_class import CALLS, CLASSES, IDLE
from bigtrain.profiling.breakdown import Breakdown

LARGEST_OTHERS = 5

MEANING = {
    CALLS: "Python, autograd and dispatch between what computes",
    IDLE: "nothing runs on the device",
}


@dataclass(frozen=True)
class ClassRow:
    """The seconds of a step that one class takes."""

    name: str
    measured: float
    predicted: float

    @property
    def gap(self) -> float:
        """Return by how many seconds it takes longer than predicted."""
        return self.measured - self.predicted

    @property
    def of_roofline(self) -> float | None:
        """Return the predicted seconds as a share of the measured ones; None where there are none."""
        return self.predicted / self.measured if self.measured and self.predicted else None


@dataclass(frozen=True)
class TimeProfile:
    """A few real steps under torch's profiler, the mean of them, beside the planner's roofline.

    `rates` says where the device's rates are from, by which `predicted` goes. `step_seconds` are of steps without the
    profiler. `recipe` is the plan as YAML.
    """

    name: str
    device: str
    rates: str
    predicted: Mapping[str, float]
    predicted_phases: Mapping[str, float]
    measured: Breakdown
    step_seconds: Sequence[float]
    recipe: str | None = None
    versions: Mapping[str, str] = field(default_factory=dict)

    @property
    def median_seconds(self) -> float:
        """Return the median of the steps without the profiler."""
        return statistics.median(self.step_seconds)

    @property
    def predicted_seconds(self) -> float:
        """Return what a step was predicted to take."""
        return sum(self.predicted.values())

    def rows(self) -> list[ClassRow]:
        """Return the classes that take time or were predicted to, in their order."""
        pairs = ((name, self.measured.by_class.get(name, 0.0), self.predicted.get(name, 0.0)) for name in CLASSES)
        return [ClassRow(*pair) for pair in pairs if any(pair[1:])]

    @property
    def next_to_look_at(self) -> ClassRow:
        """Return the class with the largest gap."""
        return max(self.rows(), key=lambda row: row.gap)

    def as_object(self) -> dict[str, Any]:
        """Return what `bigtrain profile --time --json` prints; all times in seconds of one step."""
        measured = self.measured
        return {
            "name": self.name,
            "device": self.device,
            "rates": self.rates,
            "steps": measured.steps,
            "step_seconds": list(self.step_seconds),
            "median_step_seconds": self.median_seconds,
            "profiled_step_seconds": measured.seconds,
            "predicted_step_seconds": self.predicted_seconds,
            "gap_seconds": self.median_seconds - self.predicted_seconds,
            "classes": [
                {
                    "name": row.name,
                    "measured_seconds": row.measured,
                    "share": row.measured / measured.seconds,
                    "predicted_seconds": row.predicted,
                    "gap_seconds": row.gap,
                    "of_roofline": row.of_roofline,
                }
                for row in self.rows()
            ],
            "others": measured.others,
            "phases": {"measured": measured.phases, "predicted": dict(self.predicted_phases)},
            "next_to_look_at": self.next_to_look_at.name,
            "recipe": self.recipe,
            "versions": dict(self.versions),
        }

    def lines(self) -> list[str]:
        """Return the profile for a terminal."""
        head = f"{self.name} on {self.device}: {self.summary()}"
        return [head, "", *self._table(), "", *self.notes(), self.sentence()]

    def summary(self) -> str:
        """Return what a step takes, beside the prediction and beside a step under the profiler."""
        gap = self.median_seconds - self.predicted_seconds
        return (
            f"a step takes {short_seconds(self.median_seconds)} (median of {len(self.step_seconds)}), predicted "
            f"{short_seconds(self.predicted_seconds)}, a gap of {milliseconds(gap)} (rates: {self.rates}); under the "
            f"profiler {short_seconds(self.measured.seconds)}"
        )

    def sentence(self) -> str:
        """Return which class lies farthest behind its prediction."""
        row = self.next_to_look_at
        if row.gap <= 0:
            return "next to look at: nothing; no class takes longer than predicted"
        meaning = f" ({MEANING[row.name]})" if row.name in MEANING else ""
        gap, predicted = milliseconds(row.gap), milliseconds(row.predicted)
        return f"next to look at: {words(row.name)}{meaning}, {gap} above the predicted {predicted}"

    def notes(self) -> list[str]:
        """Return the phases, what the profiler adds, and what has no class, as sentences."""
        measured = self.measured
        phases = ", ".join(
            f"{name} {milliseconds(measured.phases.get(name, 0.0))} (predicted {milliseconds(predicted)})"
            for name, predicted in self.predicted_phases.items()
            if name != "outside"
        )
        outside = measured.phases.get("outside", 0.0)
        found = [f"phases: {phases}; outside of them {milliseconds(outside)}, {outside / measured.seconds:.1%}"]
        added = measured.seconds - self.median_seconds
        if added > 0:
            found.append(
                f"under the profiler a step takes {milliseconds(added)} longer, {added / self.median_seconds:.0%}; the "
                "classes sum to that step and are not scaled"
            )
        if measured.others:
            largest = list(measured.others.items())[:LARGEST_OTHERS]
            found.append(f"other: {', '.join(f'{name} {milliseconds(seconds)}' for name, seconds in largest)}")
        return found

    def cells(self) -> Iterator[tuple[str, str, str, str, str, str]]:
        """Yield the table's rows as text: name, measured, share, predicted, gap, of the roofline; last the sum."""
        total = self.measured.seconds
        for row in self.rows():
            yield words(row.name), *_cells(row, total)
        yield "in all", *_cells(ClassRow("", total, self.predicted_seconds), total)

    def _table(self) -> list[str]:
        rows = [("", "measured", "share", "predicted", "gap", "of roofline"), *self.cells()]
        width = max(len(row[0]) for row in rows)
        return [f"{row[0]:{width}}" + "".join(f"  {cell:>11}" for cell in row[1:]) for row in rows]

    def page(self) -> str:
        """Return it as a page."""
        from bigtrain.profiling.time_picture import page

        return page(self)

    def picture(self, path: Path) -> None:
        """Write it as PNG. Raises InputError for a path that cannot be written."""
        from bigtrain.profiling.time_picture import picture

        picture(self, path)


def milliseconds(seconds: float) -> str:
    """Return a duration in milliseconds, with a digit more the shorter it is: 0.012, 1.23, 123.4 ms."""
    size = abs(1000 * seconds)
    return f"{1000 * seconds:,.{3 if size < 0.1 else 2 if size < 10 else 1}f} ms"


def _cells(row: ClassRow, total: float) -> tuple[str, str, str, str, str]:
    share = "" if row.of_roofline is None else f"{row.of_roofline:.0%}"
    gap = milliseconds(row.gap)
    return (
        milliseconds(row.measured),
        f"{row.measured / total:.1%}",
        milliseconds(row.predicted),
        gap if gap.startswith("-") else f"+{gap}",
        share,
    )
