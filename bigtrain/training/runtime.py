"""What surrounds a training loop in its process: the device, signals, seeds, resident memory."""

from __future__ import annotations

import gc
import hashlib
import os
import signal
import sys
import threading
import time
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from types import FrameType

import torch

from bigtrain.errors import Fault, RecipeError
from bigtrain.planner.plan import Plan

NODES_SIGNAL = signal.SIGUSR2
"""What an agent sends where nodes come: save, stop and start again with them."""

STOP_SIGNALS = (signal.SIGTERM, signal.SIGINT, signal.SIGUSR1, NODES_SIGNAL)
"""What asks a run to save and stop; SIGUSR1 is what Slurm sends before the time limit."""

ECHO_SECONDS = 2.0
"""One request often comes several times: to the process, to its group, and from its launcher."""


@dataclass
class Runtime:
    """The process's device, and whether a signal has asked it to stop."""

    device: torch.device
    stop_signal: signal.Signals | None = None
    asked_at: float = 0.0

    def request_stop(self, number: int, _frame: FrameType | None) -> None:
        """Note the signal; another one ends the process at once, unless it is an echo, or of nodes that change."""
        now = time.monotonic()
        if self.stop_signal is None or (self.stop_signal == NODES_SIGNAL and number != NODES_SIGNAL):
            self.stop_signal, self.asked_at = signal.Signals(number), now
        elif number != NODES_SIGNAL and now - self.asked_at > ECHO_SECONDS:
            signal.signal(number, signal.SIG_DFL)
            os.kill(os.getpid(), number)


@contextmanager
def runtime(plan: Plan) -> Iterator[Runtime]:
    """Set a process up for training as a plan says, and restore its signal handlers afterwards.

    Raises RecipeError if the plan is for CUDA and this torch has none.
    """
    here = Runtime(device_of(plan))
    main_thread = _is_main_thread()
    handlers = {number: signal.signal(number, here.request_stop) for number in STOP_SIGNALS} if main_thread else {}
    gc.collect()
    gc.freeze()
    try:
        yield here
    finally:
        gc.unfreeze()
        for number, handler in handlers.items():
            signal.signal(number, handler)


def device_of(plan: Plan) -> torch.device:
    """Return a plan's device. Raises RecipeError if it is CUDA and this torch sees none."""
    if plan.hardware.kind == "cuda" and not torch.cuda.is_available():
        text = f"'cuda': torch {torch.__version__} sees no CUDA device; install a CUDA build of torch, or use cpu"
        raise RecipeError(Fault(plan.recipe.origin("train.device"), "train.device", text))
    return torch.device(plan.hardware.kind)


def seed_step(seed: int, step: int, rank: int = 0) -> None:
    """Seed torch for one step: dropout is a pure function of (seed, step, rank), and resuming needs no RNG state."""
    text = f"{seed}/{step}/{rank}".encode()
    torch.manual_seed(int.from_bytes(hashlib.blake2b(text, digest_size=8).digest(), "little") >> 1)


def host_bytes_peak() -> int:
    """Return the most memory that this process has had resident."""
    try:
        with open("/proc/self/status") as status:  # noqa: PTH123 - read each log step; a Path adds nothing
            line = next(line for line in status if line.startswith("VmHWM:"))
        return int(line.split()[1]) * 1024
    except (OSError, StopIteration):
        import resource

        peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
        return peak if sys.platform == "darwin" else peak * 1024


def _is_main_thread() -> bool:
    return threading.current_thread() is threading.main_thread()
