"""How far the work is: a bar on a terminal, plain lines elsewhere, on standard output."""

from __future__ import annotations

import time
from typing import TYPE_CHECKING

from bigtrain import terminal
from bigtrain.units import format_count, format_seconds

if TYPE_CHECKING:
    from rich.progress import Progress as Bar
    from rich.progress import TaskID

LINE_SECONDS = 10.0


class Progress:
    """Shows the progress of one piece of work; a context manager. Silent unless `shown`."""

    def __init__(self, title: str, total_bytes: int | None, shown: bool) -> None:
        self._title, self._total = title, total_bytes
        self._begun = self._told = time.monotonic()
        self._bar: Bar | None = None
        self._task: TaskID | None = None
        shown = shown and not terminal.is_quiet()
        self._lines = shown and not terminal.is_terminal()
        if shown and not self._lines:
            from rich.progress import BarColumn, TaskProgressColumn, TextColumn, TimeRemainingColumn
            from rich.progress import Progress as Bar

            text = TextColumn("{task.description} {task.fields[tokens]}")
            columns = (BarColumn(), TaskProgressColumn(), TimeRemainingColumn())
            self._bar = Bar(text, *columns, transient=True, console=terminal.console())
            self._task = self._bar.add_task(title, total=total_bytes, tokens="")

    def __enter__(self) -> Progress:
        if self._bar is not None:
            self._bar.start()
        return self

    def __exit__(self, *error: object) -> None:
        if self._bar is not None:
            self._bar.stop()

    def update(self, read_bytes: int, tokens: int) -> None:
        """Show how much of the source was read, and how many tokens it has given."""
        text = f"{format_count(tokens)} tokens, {format_count(tokens / self.seconds)} a second"
        if self._bar is not None and self._task is not None:
            self._bar.update(self._task, completed=read_bytes, tokens=text)
        elif self._lines and time.monotonic() - self._told >= LINE_SECONDS:
            self._told = time.monotonic()
            print(f"{self._title}: {self._share(read_bytes)}{text}", flush=True)

    def say(self, text: str) -> None:
        """Print a line that stays."""
        if self._bar is not None:
            self._bar.console.print(text, highlight=False)
        elif self._lines:
            print(text, flush=True)

    @property
    def seconds(self) -> float:
        """Return the seconds since the start."""
        return max(time.monotonic() - self._begun, 1e-6)

    def _share(self, read_bytes: int) -> str:
        if not self._total or not read_bytes:
            return ""
        left = self.seconds * (self._total - read_bytes) / read_bytes
        return f"{read_bytes / self._total:.0%}, {format_seconds(left)} left, "
