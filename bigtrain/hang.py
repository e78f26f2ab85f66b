"""What is said of a run that hangs: the stacks of all its processes here, and which of them the others wait for."""

from __future__ import annotations

import os
import platform
import re
import time
from collections.abc import Sequence
from contextlib import suppress
from dataclasses import dataclass, field
from pathlib import Path

from bigtrain.activity import activity, waits_in
from bigtrain.heartbeat import STACKS_SIGNAL, Beat

STACKS_SECONDS = 0.8
"""How long processes have to write their stacks down; it takes milliseconds."""

COMPUTING_SECONDS = 1.0
"""One that has shown life within so long still computes: the others wait for it."""

SHOWN_FRAMES = 6
"""So many frames of the culprit's stack are shown, the innermost ones."""

EXCHANGE_FRAMES = 4
"""Among so many innermost frames stands torch's distributed code if a process waits for the others."""

_THREAD = re.compile(r"^(?=(?:Current thread|Thread) 0x)", re.MULTILINE)


@dataclass(frozen=True)
class Stuck:
    """One process of a run that hangs. `stack` is that of its main thread, innermost first, empty if not known."""

    rank: int
    host: str
    beats: int
    step: int
    place: str
    stopped: bool
    quiet_seconds: float
    stack: list[str] = field(default_factory=list)

    @property
    def exchanging(self) -> bool:
        """Tell whether it waits for other ranks."""
        return any("/torch/distributed/" in frame for frame in self.stack[:EXCHANGE_FRAMES])

    def named(self) -> str:
        """Say which rank it is, and where it runs."""
        return f"rank {self.rank} on {self.host}"

    def described(self) -> str:
        """Say in one line where it is and what it does there."""
        return f"{self.place}, {self._state()}"

    def _state(self) -> str:
        if self.stopped:
            return "stopped by a signal"
        if self.exchanging:
            return "waiting for other ranks"
        return "computing" if self.quiet_seconds < COMPUTING_SECONDS else "idle"


class Hang:
    """A hang, as one machine sees it: its processes, and their stacks as they wrote them."""

    def __init__(self, ranks: Sequence[Stuck], stacks: Sequence[str], timeout_seconds: float) -> None:
        self.ranks, self._stacks, self.timeout_seconds = list(ranks), list(stacks), timeout_seconds

    def write(self, run_dir: Path) -> Path | None:
        """Write all stacks into a file of the run folder and return it; None where that cannot be written."""
        step = max(rank.step for rank in self.ranks)
        path = run_dir / f"stacks-{step:08d}-{platform.node()}.txt"
        parts = (
            f"{rank.named()}: {rank.described()}, no sign of life for {rank.quiet_seconds:.1f} s\n{stack}"
            for rank, stack in zip(self.ranks, self._stacks, strict=True)
        )
        with suppress(OSError):
            path.write_text("\n".join(parts), encoding="utf-8")
            return path
        return None


def told(ranks: Sequence[Stuck], timeout_seconds: float, path: Path | None) -> str:
    """Say who hangs, in one line, and show the innermost frames of its stack below it."""
    found = culprit(ranks)
    where = f"; all stacks: {path}" if path is not None else ""
    since = f"nothing moved for {timeout_seconds:g} s (cluster.timeout)"
    first = f"{found.named()} is stuck in {found.described()}; {since}{where}"
    return "\n".join([first, *(f"  {frame}" for frame in found.stack[:SHOWN_FRAMES])])


def culprit(ranks: Sequence[Stuck]) -> Stuck:
    """Return the rank that the others wait for: one that is stopped, that waits for none, that has come least far."""
    return min(ranks, key=lambda rank: (not rank.stopped, rank.exchanging, rank.beats, rank.rank))


def examine(
    processes: Sequence[int], first: int, beats: Sequence[Beat], quiet: Sequence[float], stacks: Sequence[int]
) -> tuple[list[Stuck], list[str]]:
    """Have processes, ranks from `first` on, write their stacks into files of these numbers.

    Returns what is known of each, and what it wrote. `quiet` are the seconds without a sign of life.
    """
    found = [activity(process) for process in processes]
    stopped = [one is not None and one.stopped for one in found]
    texts = _stacks(processes, stopped, stacks)
    host = platform.node()
    ranks = [
        Stuck(rank, host, *beat[:2], beat.place(), still, seconds, main_stack(text))
        for rank, (beat, still, seconds, text) in enumerate(zip(beats, stopped, quiet, texts, strict=True), first)
    ]
    return ranks, texts


def main_stack(text: str) -> list[str]:
    """Return the frames of the main thread among those that faulthandler wrote, innermost first."""
    threads = _THREAD.split(text)
    main = next((one for one in threads if "bigtrain/training/__main__.py" in one), "")
    return [line.strip() for line in main.splitlines() if line.startswith("  File")]


def _stacks(processes: Sequence[int], stopped: Sequence[bool], files: Sequence[int]) -> list[str]:
    asked = []
    for process, still, file in zip(processes, stopped, files, strict=True):
        if not still:
            with suppress(ProcessLookupError):
                os.kill(process, STACKS_SIGNAL)
                asked.append(file)
    end, sizes = time.monotonic() + STACKS_SECONDS, [-1]
    while time.monotonic() < end:
        now = [os.fstat(file).st_size for file in asked]
        if all(now) and now == sizes:
            break
        sizes = now
        time.sleep(0.05)
    return [_text(process, file) for process, file in zip(processes, files, strict=True)]


def _text(process: int, file: int) -> str:
    text = os.pread(file, os.fstat(file).st_size, 0).decode(errors="replace")
    kernel = waits_in(process)
    return text + (f"waits in the kernel's {kernel}\n" if kernel else "")
