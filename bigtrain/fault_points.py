"""Faults by name, for tests: what a test asks for in the environment happens at a point of a run. Off unless asked for.

`BIGTRAIN_FAULTS` holds faults, separated by blanks: `point:action[=number][:rank=N][:step=N][:once=FILE]`, such as
`backward:kill:rank=1:step=7`. Without `rank` all ranks have it, without `step` every step; with `once` only the first
that makes the file, so that a run that starts again is left alone. No torch here.
"""

from __future__ import annotations

import os
import signal
import time
from dataclasses import dataclass
from pathlib import Path

VARIABLE = "BIGTRAIN_FAULTS"

POINTS = (
    "start", "data", "forward", "backward", "update", "save", "publish", "evaluate", "loss", "gradient", "weights",
)  # fmt: skip
"""start: the ranks have met. data: before a step's rows are taken. forward, backward: before those of each micro-batch.
update: before the optimizer. save: before anything of a checkpoint is written. publish: before its rename. evaluate:
before an evaluation. loss, gradient, weights: values that `change` is for, as in `bigtrain.training.injected`: the loss
of each micro-batch, all gradients that flow from it, and after the update that makes step N a bit of the parameters.
"""

ACTIONS = ("kill", "stop", "hang", "slow", "raise", "change")
"""kill: SIGKILL to this process; stop: SIGSTOP; hang: sleep for good; slow=S: sleep S seconds; raise: RuntimeError;
change[=number]: `reached` returns the number (1 without one), and the caller changes the value as it says there.
"""


@dataclass(frozen=True, slots=True)
class _Asked:
    point: str
    action: str
    number: float = 1.0
    rank: int | None = None
    step: int | None = None
    once: Path | None = None

    def meant(self, point: str, step: int) -> bool:
        """Tell whether this is the place, and the first time where only that counts."""
        rank = int(os.environ.get("RANK", "0"))
        if self.point != point or self.rank not in (None, rank) or self.step not in (None, step):
            return False
        if self.once is None:
            return True
        try:
            self.once.touch(exist_ok=False)
        except FileExistsError:
            return False
        return True


def reached(point: str, step: int = 0) -> float | None:
    """Do what was asked for at this point of a step, if anything was; the number of a `change`, else None."""
    if not _ASKED:
        return None
    for asked in _ASKED:
        if asked.meant(point, step):
            if asked.action == "change":
                return asked.number
            _happen(asked)
    return None


def _happen(asked: _Asked) -> None:
    if asked.action in ("kill", "stop"):
        os.kill(os.getpid(), signal.SIGKILL if asked.action == "kill" else signal.SIGSTOP)
    elif asked.action == "hang":
        while True:
            time.sleep(3600)
    elif asked.action == "slow":
        time.sleep(asked.number)
    else:
        raise RuntimeError(f"fault at {asked.point}, as {VARIABLE} asks for")


def parse(text: str) -> list[_Asked]:
    """Return the faults that a text asks for. Raises ValueError for one that there is not."""
    return [_parse_one(word) for word in text.split()]


def _parse_one(word: str) -> _Asked:
    point, action, *limits = word.split(":")
    action, _, number = action.partition("=")
    if point not in POINTS or action not in ACTIONS:
        raise ValueError(
            f"{VARIABLE}: {word}: use a point of {', '.join(POINTS)} and an action of {', '.join(ACTIONS)}"
        )
    found = dict(limit.split("=", 1) for limit in limits)
    if unknown := set(found) - {"rank", "step", "once"}:
        raise ValueError(f"{VARIABLE}: {word}: no limit {sorted(unknown)[0]!r}; use rank, step, once")
    return _Asked(
        point,
        action,
        float(number or 1),
        int(found["rank"]) if "rank" in found else None,
        int(found["step"]) if "step" in found else None,
        Path(found["once"]) if "once" in found else None,
    )


_ASKED = parse(os.environ.get(VARIABLE, ""))
