"""How a run shows itself: a bar on a terminal, a plain line each logged step elsewhere."""

from __future__ import annotations

import time
from collections.abc import Mapping
from types import TracebackType
from typing import Any, Self

from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeRemainingColumn

from bigtrain import terminal
from bigtrain.units import format_bytes, format_count, format_seconds

DRAW_SECONDS = 0.1
"""The bar moves no more often than that."""


class RunProgress:
    """Show the steps of a run, unless quiet; use as a context manager."""

    def __init__(self, total_steps: int, *, step: int, quiet: bool = False) -> None:
        self._total_steps, self._quiet = total_steps, quiet or terminal.is_quiet()
        self._console = terminal.console()
        self._bar: Progress | None = None
        self._drawn_at = 0.0
        if self._console.is_terminal and not self._quiet:
            columns = (TextColumn("step"), MofNCompleteColumn(), BarColumn(bar_width=None), TimeRemainingColumn())
            shown = TextColumn("{task.fields[figures]}")
            # Drawn here and not by a thread: a process that waits is to be idle.
            self._bar = Progress(*columns, shown, console=self._console, auto_refresh=False)
            self._task = self._bar.add_task("", total=total_steps, completed=step, figures="")

    def __enter__(self) -> Self:
        if self._bar is not None:
            self._bar.start()
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        if self._bar is not None:
            self._bar.stop()

    def advance(self, step: int) -> None:
        """Move the bar."""
        if self._bar is not None:
            self._bar.update(self._task, completed=step)
            self._draw()

    def _draw(self) -> None:
        now = time.monotonic()
        if self._bar is not None and now - self._drawn_at >= DRAW_SECONDS:
            self._drawn_at = now
            self._bar.refresh()

    def log(self, row: Mapping[str, Any], seconds_left: float) -> None:
        """Show a logged step."""
        if self._bar is not None:
            self._bar.update(self._task, figures=figures(row), refresh=True)
        else:
            self.say(f"step {row['step']}/{self._total_steps}  {figures(row)}  {format_seconds(seconds_left)} left")

    def say(self, text: str) -> None:
        """Print a line above the bar."""
        if self._bar is not None:
            self._console.print(text)
        elif not self._quiet:
            print(text, flush=True)


def figures(row: Mapping[str, Any]) -> str:
    """Return the figures of a metrics row that a person watches."""
    parts = [
        f"loss {row['loss']:.4f}",
        f"lr {row['learning_rate']:.2e}",
        f"{format_count(row['tokens_per_second'])} tokens/s",
        f"MFU {row['mfu']:.0%}",
        format_bytes(row["allocated_bytes_peak"] or row["host_bytes_peak"]),
    ]
    if row["skipped"]:
        parts.append(f"{row['skipped']} skipped")
    return "  ".join(parts)
