"""A launcher as a process of its own, watched from outside: what it prints and when, and when its workers live."""

from __future__ import annotations

import json
import os
import re
import signal
import subprocess
import sys
import threading
import time
from collections.abc import Callable
from contextlib import suppress
from dataclasses import dataclass
from pathlib import Path
from typing import NamedTuple

LOOK_SECONDS = 0.02

STEP = re.compile(r"step (\d+)/")


class Line(NamedTuple):
    """What was printed, and when (time.time)."""

    at: float
    text: str


@dataclass
class Life:
    """When a worker was first seen, and when it was gone for its launcher: noticed, and waited for."""

    process: int
    begun: float
    gone: float | None = None


class Launched:
    """`bigtrain launch` under way. `lines` and `lives` grow while it runs."""

    def __init__(self, recipe: Path, run: Path, *overrides: str, faults: str = "") -> None:
        argv = [sys.executable, "-m", "bigtrain", "launch", str(recipe), *overrides, "--run-dir", str(run)]
        environment = {**os.environ, "OMP_NUM_THREADS": "1", "BIGTRAIN_FAULTS": faults}
        self.run, self.begun = run, time.time()
        self.process = subprocess.Popen(
            argv, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True, env=environment, bufsize=1
        )
        self.lines: list[Line] = []
        self.lives: list[Life] = []
        self.ended = 0.0
        self._threads = [threading.Thread(target=work, daemon=True) for work in (self._read, self._look)]
        for thread in self._threads:
            thread.start()

    def wait(self, seconds: float = 500) -> int:
        """Return the exit code; `ended` is when that was."""
        try:
            self.process.wait(timeout=seconds)
        except subprocess.TimeoutExpired:
            self.kill()
            raise AssertionError(f"not ended within {seconds} s:\n{self.output}") from None
        for thread in self._threads:
            thread.join()
        return self.process.returncode

    def wait_for(self, what: Callable[[], object], seconds: float = 300) -> None:
        """Wait until something is so; fail with what was printed if the launcher ends before."""
        end = time.time() + seconds
        while not what():
            if time.time() > end or self.process.poll() is not None:
                self.kill()
                raise AssertionError(f"did not come:\n{self.output}")
            time.sleep(LOOK_SECONDS)

    def kill(self) -> None:
        """End the launcher, which takes its workers with it."""
        self.process.kill()
        self.process.wait()

    def signal_workers(self, number: signal.Signals, index: int | None = None) -> None:
        """Send a signal to one worker that lives, in their order, or to all."""
        living = self.workers
        for process in living if index is None else living[index : index + 1]:
            with suppress(ProcessLookupError):
                os.kill(process, number)

    @property
    def output(self) -> str:
        return "".join(line.text for line in self.lines)

    @property
    def workers(self) -> list[int]:
        return [life.process for life in self.lives if life.gone is None]

    def steps_after(self, at: float) -> list[Line]:
        """Return the lines of steps that were printed after a time."""
        return [line for line in list(self.lines) if line.at > at and STEP.match(line.text)]

    def attempts(self, world_size: int) -> list[list[Life]]:
        """Return the workers of each attempt."""
        return [self.lives[first : first + world_size] for first in range(0, len(self.lives), world_size)]

    def _read(self) -> None:
        assert self.process.stdout is not None
        with self.process.stdout as output:
            for text in output:
                self.lines.append(Line(time.time(), text))

    def _look(self) -> None:
        children = Path(f"/proc/{self.process.pid}/task/{self.process.pid}/children")
        while self.process.poll() is None:
            with suppress(OSError):
                self._note({int(word) for word in children.read_text().split()})
            time.sleep(LOOK_SECONDS)
        self.ended = time.time()
        self._note(set())

    def _note(self, living: set[int]) -> None:
        known = set(self.workers)
        for life in self.lives:
            if life.gone is None and life.process not in living:
                life.gone = time.time()
        for process in sorted(living - known):
            with suppress(OSError):
                if "bigtrain.training" in Path(f"/proc/{process}/cmdline").read_text():
                    self.lives.append(Life(process, time.time()))


def losses(run: Path) -> list[tuple[int, float]]:
    """Return each logged step with its loss, evaluations included, as they stand in a run folder."""
    rows = [json.loads(line) for line in (run / "metrics.jsonl").read_text().splitlines()]
    return [(row["step"], row.get("loss", row.get("eval_loss"))) for row in rows]


def weights_digest(run: Path) -> dict[str, str]:
    """Return the SHA-256 of each file of tensors in the newest checkpoint."""
    newest = max(run.glob("step-*"))
    files = json.loads((newest / "manifest.json").read_text())["files"]
    return {name: entry["sha256"] for name, entry in files.items() if name.endswith(".safetensors")}
