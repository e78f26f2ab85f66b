"""How a command speaks: quiet or verbose, on a terminal or not. The one place that knows. No torch, and rich when used.

What a command was asked for stands on standard output. What it tells besides (the next command, progress) stands there
too where people read it, and on standard error (`aside`) where standard output is for a program.
"""

from __future__ import annotations

import os
import sys
import time
from collections.abc import Iterator
from contextlib import contextmanager
from threading import Event, Thread
from typing import TYPE_CHECKING, Literal, TextIO

if TYPE_CHECKING:
    from rich.console import Console

VARIABLE = "BIGTRAIN_VERBOSITY"
"""quiet, normal or verbose: processes that a command starts inherit it."""

Verbosity = Literal["quiet", "normal", "verbose"]

PATIENCE_SECONDS = 2.0
"""What takes longer is shown on a terminal."""

LINE_SECONDS = 10.0
"""Elsewhere, a line says so each so many seconds."""


def set_verbosity(level: Verbosity) -> None:
    """Have this process, and those that it starts from now on, say so much."""
    os.environ[VARIABLE] = level


def is_quiet() -> bool:
    """Tell whether only errors and results are wanted."""
    return os.environ.get(VARIABLE) == "quiet"


def is_verbose() -> bool:
    """Tell whether versions, places and tracebacks are wanted, too."""
    return os.environ.get(VARIABLE) == "verbose"


def tell(text: str, *, aside: bool = False) -> None:
    """Print what was done, unless quiet."""
    if not is_quiet():
        print(text, file=_stream(aside), flush=True)


def tell_next(*commands: str, aside: bool = False) -> None:
    """Print the command to go on with, or several to choose from, unless quiet."""
    tell(f"next: {', or: '.join(commands)}", aside=aside)


def is_terminal(*, aside: bool = False) -> bool:
    """Tell whether a person watches standard output, or standard error, and lines can be drawn over there."""
    return _stream(aside).isatty() and os.environ.get("TERM") != "dumb"


def console(*, aside: bool = False) -> Console:
    """Return rich's console: colours on a terminal alone, and none where NO_COLOR is set, whatever else is."""
    from rich.console import Console

    on_terminal = is_terminal(aside=aside)
    # rich takes NO_COLOR for no colour, but draws for a terminal wherever FORCE_COLOR is set.
    return Console(stderr=aside, highlight=False, force_terminal=on_terminal, force_interactive=on_terminal)


@contextmanager
def working(doing: str, *, aside: bool = False) -> Iterator[None]:
    """Show what takes long, when it has begun to: a line that moves on a terminal, or else plain lines, unless quiet.

    Aside, only a terminal is told: a program that reads standard output has no use for it.
    """
    ended = Event()
    drawn = is_terminal(aside=aside)
    watcher = Thread(target=_move if drawn else _repeat, args=(doing, aside, ended), daemon=True)
    if not is_quiet() and (drawn or not aside):
        watcher.start()
    try:
        yield
    finally:
        ended.set()
        if watcher.ident is not None:
            watcher.join()


def _move(doing: str, aside: bool, ended: Event) -> None:
    if ended.wait(PATIENCE_SECONDS):
        return
    from rich.progress import Progress, SpinnerColumn, TextColumn, TimeElapsedColumn

    columns = (SpinnerColumn("line"), TextColumn("{task.description}"), TimeElapsedColumn())
    with Progress(*columns, console=console(aside=aside), transient=True) as progress:
        progress.add_task(doing, total=None)
        ended.wait()


def _repeat(doing: str, aside: bool, ended: Event) -> None:
    begun = time.monotonic()
    while not ended.wait(LINE_SECONDS):
        print(f"{doing} ... {time.monotonic() - begun:.0f} s", file=_stream(aside), flush=True)


def _stream(aside: bool) -> TextIO:
    return sys.stderr if aside else sys.stdout
