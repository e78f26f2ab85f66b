"""How far predicted seconds are from measured ones, and what that costs whoever chooses by them."""

from __future__ import annotations

import statistics
from typing import Any

BUDGETS = 5


def summarize(cases: dict[str, dict[str, Any]]) -> dict[str, Any]:
    """Return the errors of times, of ratios between choices, and how good the predicted best is, over all cases."""
    absolute, ratios = [], []
    for rows in (case["choices"] for case in cases.values()):
        errors = [row["predicted_seconds"] / row["measured_seconds"] for row in rows]
        middle = statistics.median(errors)
        absolute += [abs(error - 1) for error in errors]
        ratios += [abs(error / middle - 1) for error in errors]
    shares = [share for case in cases.values() for share in case["share_of_the_best"]]
    return {
        "cases": len(cases),
        "choices": len(absolute),
        "seconds_error": {"median": statistics.median(absolute), "worst": max(absolute)},
        "ratio_error": {"median": statistics.median(ratios), "worst": max(ratios)},
        "share_of_the_best": {
            "median": statistics.median(shares),
            "worst": min(shares),
            "budgets": len(shares),
            "below_0.95": sum(share < 0.95 for share in shares),
        },
    }


def at_budgets(rows: list[dict[str, Any]]) -> list[float]:
    """Return the speed of what is predicted to be fastest, as a share of the fastest, at budgets from least to most."""
    found = []
    for budget in budgets(rows):
        fitting = [row for row in rows if row["allocated_bytes_peak"] <= budget]
        chosen = min(fitting, key=lambda row: row["predicted_seconds"])
        found.append(min(row["measured_seconds"] for row in fitting) / chosen["measured_seconds"])
    return found


def budgets(rows: list[dict[str, Any]]) -> list[float]:
    """Return allocated bytes evenly spread from what the smallest choice needs to what the largest does."""
    sizes = sorted(row["allocated_bytes_peak"] for row in rows)
    return [sizes[0] + (sizes[-1] - sizes[0]) * part / (BUDGETS - 1) for part in range(BUDGETS)]
