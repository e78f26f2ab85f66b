"""What `bigtrain profile --json` prints, as types, and what pages and pictures show of its timelines. No torch."""

from __future__ import annotations

from itertools import groupby
from typing import NotRequired, TypedDict

from bigtrain.charts.lines import thin

STACKED = (
    "weights",
    "master_weights",
    "optimizer_state",
    "gradients",
    "activations",
    "logits",
    "temporaries",
    "communication",
)
"""The causes from the lowest of a stack to the highest: what stays all the step long is below what comes and goes."""

SIDES = ("predicted", "measured")

NARROWEST_BAND = 0.01
"""Of the step; shorter phases, such as the updates within a backward pass, get no band of their own."""


class MemoryObject(TypedDict):
    """What `MemoryReport.as_object` gives; None is not known."""

    allocated_bytes_peak: int
    reserved_bytes_peak: int | None
    device_bytes_peak: int | None
    host_bytes_peak: int | None
    by_cause: dict[str, int]


class TimelineObject(TypedDict):
    """Bytes alive during one step, in columns of the same length, at least one row.

    `time` rises from 0 to 1 along the step's allocations and releases, the same predicted and measured. `label` says
    where in the model and in which phase: `blocks.3 forward`. A row holds until the next one.
    """

    time: list[float]
    causes: dict[str, list[int]]
    label: list[str]


class BlockObject(TypedDict):
    """What one part of the model holds at the peak of the step."""

    name: str
    predicted_bytes: int
    measured_bytes: int


class ChangeObject(TypedDict):
    """A change of the recipe, the bytes and the share of the tokens per second that it is predicted to add."""

    change: str
    bytes: int
    tokens_per_second: float | None


class ProfileObject(TypedDict):
    """What `bigtrain profile --json` prints. `relative_error` is predicted / measured - 1 of the allocated peak.

    `recipe` is the plan as YAML; None for a model that no recipe describes. `versions` are by name of the library.
    `timeline` may lack a side that was not recorded.
    """

    name: str
    device: str
    predicted: MemoryObject
    measured: MemoryObject
    relative_error: float
    predicted_step_seconds: NotRequired[float | None]
    measured_step_seconds: NotRequired[float | None]
    blocks: list[BlockObject]
    timeline: dict[str, TimelineObject]
    changes: list[ChangeObject]
    recipe: str | None
    versions: dict[str, str]


def thin_timeline(timeline: TimelineObject) -> TimelineObject:
    """Return at most 600 of a timeline's rows, the peak, the first and the last among them."""
    kept = [index for index, _ in thin(list(enumerate(totals(timeline))))]
    return {
        "time": [timeline["time"][index] for index in kept],
        "causes": {cause: [sizes[index] for index in kept] for cause, sizes in timeline["causes"].items()},
        "label": [timeline["label"][index] for index in kept],
    }


def bands(timeline: TimelineObject) -> list[tuple[float, str]]:
    """Return where each phase begins and its name, the last word of the labels; very short ones are left out."""
    rows = list(zip(timeline["time"], timeline["label"], strict=True))
    begun = [(next(group)[0], phase) for phase, group in groupby(rows, lambda row: row[1].rpartition(" ")[2])]
    ends = [begin for begin, _ in begun[1:]] + [1.0]
    wide: list[tuple[float, str]] = []
    for (begin, phase), end in zip(begun, ends, strict=True):
        if end - begin >= NARROWEST_BAND and (not wide or wide[-1][1] != phase):
            wide.append((begin, phase))
    return wide


def totals(timeline: TimelineObject) -> list[int]:
    """Return the bytes alive at each row, of all causes together."""
    return [sum(sizes) for sizes in zip(*timeline["causes"].values(), strict=True)]


def peak_place(timeline: TimelineObject) -> tuple[float, str]:
    """Return when a timeline is at its peak for the first time, and the label of that row."""
    sizes = totals(timeline)
    row = sizes.index(max(sizes))
    return timeline["time"][row], timeline["label"][row]
