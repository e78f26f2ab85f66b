"""What a profile found: measured beside predicted, by cause, by block and over one step."""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import cast

from bigtrain.memory import picture
from bigtrain.memory.profiled import BlockObject, ChangeObject, MemoryObject, ProfileObject, TimelineObject
from bigtrain.memory.record import Recording
from bigtrain.memory.report import CAUSES, MemoryReport
from bigtrain.profiling.steps import Measured
from bigtrain.units import format_bytes

ELSEWHERE = "outside of the blocks"


@dataclass(frozen=True)
class Predicted:
    """What was predicted of the same steps: `recording` of two, in which the mark `step` begins the second."""

    memory: MemoryReport
    recording: Recording
    step: str
    step_seconds: float | None


@dataclass(frozen=True)
class Profile:
    """A few real steps beside what was predicted of them. `recipe` is the plan as YAML, where there is one."""

    name: str
    device: str
    predicted: Predicted
    measured: Measured
    recipe: str | None = None
    changes: Sequence[ChangeObject] = ()
    versions: Mapping[str, str] = field(default_factory=dict)

    @property
    def relative_error(self) -> float:
        """Return the error of the predicted peak as a share of the measured one, above 0 if it is too high."""
        measured = self.measured.memory.allocated_bytes_peak
        return self.predicted.memory.allocated_bytes_peak / measured - 1 if measured else 0.0

    def as_object(self) -> ProfileObject:
        """Return what `bigtrain profile --json` prints."""
        return {
            "name": self.name,
            "device": self.device,
            "predicted": memory_object(self.predicted.memory),
            "measured": memory_object(self.measured.memory),
            "relative_error": self.relative_error,
            "predicted_step_seconds": self.predicted.step_seconds,
            "measured_step_seconds": self.measured.step_seconds,
            "blocks": self.blocks(),
            "timeline": {
                "predicted": timeline(self.predicted.recording, self.predicted.step),
                "measured": timeline(self.measured.recording, self.measured.step),
            },
            "changes": list(self.changes),
            "recipe": self.recipe,
            "versions": dict(self.versions),
        }

    def page(self) -> str:
        """Return it as a page."""
        return picture.page(self.as_object())

    def picture(self, path: Path) -> None:
        """Write it as PNG. Raises InputError for a path that cannot be written."""
        picture.picture(self.as_object(), path)

    def blocks(self) -> list[BlockObject]:
        """Return what each block holds at the peak of the step, and last all that is outside of them."""
        predicted = self.predicted.recording.places_at_peak(self.predicted.step)
        measured = self.measured.recording.places_at_peak(self.measured.step)
        return [
            {
                "name": name or ELSEWHERE,
                "predicted_bytes": predicted.get(name, 0),
                "measured_bytes": measured.get(name, 0),
            }
            for name in sorted(predicted.keys() | measured.keys(), key=_in_order)
        ]

    def lines(self) -> list[str]:
        """Return the profile for a terminal: the causes, then what they sum to, the blocks, the time of a step."""
        rows: list[tuple[str, ...]] = [_row(name, *sizes) for name, sizes in self._sizes()]
        rows += [_row(block["name"], block["predicted_bytes"], block["measured_bytes"]) for block in self.blocks()]
        seconds = (self.predicted.step_seconds, self.measured.step_seconds)
        rows.append(("seconds per step", *("not known" if s is None else f"{s:.3f}" for s in seconds)))
        rows.insert(0, ("", "predicted", "measured"))
        width = max(len(row[0]) for row in rows)
        table = [f"{row[0]:{width}}  {row[1]:>12}  {row[2]:>12}" for row in rows]
        side = "high" if self.relative_error >= 0 else "low"
        head = f"{self.name} on {self.device}: the peak was predicted {abs(self.relative_error):.3%} too {side}"
        return [head, "", *table]

    def _sizes(self) -> Iterator[tuple[str, tuple[int | None, int | None]]]:
        """Yield each cause that holds something, and each peak, with its name."""
        predicted, measured = self.predicted.memory, self.measured.memory
        for cause in CAUSES:
            sizes = predicted.by_cause.get(cause, 0), measured.by_cause.get(cause, 0)
            if any(sizes):
                yield cause, sizes
        yield "allocated in all", (predicted.allocated_bytes_peak, measured.allocated_bytes_peak)
        yield "reserved", (predicted.reserved_bytes_peak, measured.reserved_bytes_peak)
        yield "on the device", (predicted.device_bytes_peak, measured.device_bytes_peak)
        yield "on the host", (predicted.host_bytes_peak, measured.host_bytes_peak)


def memory_object(report: MemoryReport) -> MemoryObject:
    """Return a report as it is printed."""
    return cast(MemoryObject, report.as_object())


def timeline(recording: Recording, step: str) -> TimelineObject:
    """Return a step of a recording as it is printed, in at most some hundred rows."""
    return cast(TimelineObject, recording.timeline(step))


def _in_order(name: str) -> tuple[bool, list[tuple[int, str]]]:
    """Order `blocks.2` before `blocks.10`, and what has no name last."""
    return not name, [(int(part) if part.isdigit() else -1, part) for part in name.split(".")]


def _row(name: str, *sizes: int | None) -> tuple[str, ...]:
    return (name, *("not known" if size is None else format_bytes(size) for size in sizes))
