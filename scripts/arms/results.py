"""Lines of a result file: one a round and arm, and the summary of them."""

from __future__ import annotations

import json
import statistics
from collections.abc import Iterable, Sequence
from pathlib import Path
from typing import Any

OURS = "bigtrain"


def read(path: Path | None) -> list[dict[str, Any]]:
    """Return the lines of a file, none if it is not there; a last one that is torn is left out."""
    if path is None or not path.is_file():
        return []
    found = []
    for line in path.read_text(encoding="utf-8").splitlines(keepends=True):
        if line.endswith("\n") and line.strip():
            found.append(json.loads(line))
    return found


def append(path: Path | None, line: dict[str, Any]) -> None:
    """Add a line to the file if there is to be one; what is torn at its end is cut off first."""
    if path is None:
        return
    path.parent.mkdir(parents=True, exist_ok=True)
    with path.open("a+b") as file:
        file.seek(0)
        whole = file.read().rfind(b"\n") + 1
        file.truncate(whole)
        file.write(json.dumps(line).encode() + b"\n")


def rates(found: dict[str, Any], facts: dict[str, Any]) -> dict[str, Any]:
    """Return model FLOP/s, and those against the device's peak in the table and against what was measured on it."""
    flops = found["tokens_per_second"] * facts["flops_per_token"]
    peak, measured = facts["peak_flops_per_second"], facts["measured_flops_per_second"]
    return {
        "model_flops_per_second": flops,
        "mfu": flops / peak if peak else None,
        "mfu_measured": flops / measured if measured else None,
    }


MEDIANS = ("tokens_per_second", "seconds_per_step", "host_bytes_peak", "allocated_bytes_peak", "model_flops_per_second",
           "mfu", "mfu_measured", "outside_share")  # fmt: skip


def summarize(lines: Sequence[dict[str, Any]], arms: Iterable[str]) -> dict[str, Any]:
    """Return medians over rounds of each arm, and bigtrain's tokens/s and memory over each other arm's by round."""
    by_arm = {arm: {line["round"]: line for line in lines if line["arm"] == arm} for arm in arms}
    ran = {arm: {n: line for n, line in rounds.items() if "not_run" not in line} for arm, rounds in by_arm.items()}
    found: dict[str, Any] = {}
    for arm, rounds in by_arm.items():
        if ran[arm]:
            found[arm] = _medians(list(ran[arm].values())) | _beside(ran.get(OURS, {}), ran[arm], arm)
        elif rounds:
            found[arm] = {"not_run": next(iter(rounds.values()))["not_run"]}
    return found


def _medians(lines: list[dict[str, Any]]) -> dict[str, Any]:
    found: dict[str, Any] = {"rounds": len(lines), "micro_batch_size": lines[-1]["micro_batch_size"]}
    for name in MEDIANS:
        values = [line[name] for line in lines if line.get(name) is not None]
        found[name] = statistics.median(values) if values else None
    return found | {name: lines[-1][name] for name in ("loss_first", "loss_last")}


def _beside(ours: dict[int, Any], theirs: dict[int, Any], arm: str) -> dict[str, Any]:
    both = sorted(ours.keys() & theirs.keys())
    if arm == OURS or not both:
        return {}
    memory = "allocated_bytes_peak" if ours[both[0]]["allocated_bytes_peak"] else "host_bytes_peak"
    pairs = [(ours[number], theirs[number]) for number in both]
    ratios = [one["tokens_per_second"] / other["tokens_per_second"] for one, other in pairs]
    return {
        "bigtrain_ratio": {"median": statistics.median(ratios), "rounds": ratios},
        "bigtrain_memory_ratio": statistics.median(one[memory] / other[memory] for one, other in pairs),
        "loss_difference": max(abs(one["loss_last"] - other["loss_last"]) for one, other in pairs),
    }
