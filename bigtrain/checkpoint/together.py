"""What all ranks do at the same time, each its share, and which fails on all of them or on none."""

from __future__ import annotations

import errno
import json
import platform
from collections.abc import Callable, Mapping
from concurrent.futures import Future, ThreadPoolExecutor, wait
from contextlib import nullcontext
from typing import Any

from bigtrain.errors import CheckpointError
from bigtrain.heartbeat import left_to
from bigtrain.world import World

PULSE_SECONDS = 1.0
"""How often a rank that is still at work tells the others: they wait for an answer no longer than `cluster.timeout`."""


def together(world: World, work: Callable[[], Mapping[str, Any]]) -> list[dict[str, Any]]:
    """Do something on every rank and return, on every rank, what each of them returned, which is JSON.

    What it raises on one rank ends it on all: there it is raised as it is, elsewhere as an OSError of the same number
    or a CheckpointError, with rank and host. However long a rank's share takes, the others wait for it.
    """
    if world.size == 1:
        return [dict(work())]
    with ThreadPoolExecutor(1) as pool:
        task = pool.submit(lambda: json.dumps(dict(work())))
        while _any_at_work(world, task):
            pass
    error = task.exception()
    told = {"host": platform.node(), **(_described(error) if error else {"result": task.result()})}
    reports = [json.loads(text) for text in world.gather(json.dumps(told))]
    faults = [(rank, report) for rank, report in enumerate(reports) if "fault" in report]
    if not faults:
        return [json.loads(report["result"]) for report in reports]
    # What is no refusal of a disk outweighs one that is, lest some ranks go on and others do not.
    rank, worst = min(faults, key=lambda fault: fault[1]["errno"] is not None)
    if error is not None and (told["errno"] is None) == (worst["errno"] is None):
        raise error
    raise _raised_elsewhere(rank, worst) from error


def _any_at_work(world: World, task: Future[str]) -> bool:
    """Wait a moment for this rank's share, and tell whether any rank is at work; one that is shows its own life."""
    done = bool(wait([task], timeout=PULSE_SECONDS).done)
    with nullcontext() if done else left_to(None):
        return world.any(not done)


def _described(error: BaseException) -> dict[str, Any]:
    if isinstance(error, OSError):
        where = f"{error.filename}: " if error.filename else ""
        return {"fault": f"{where}{error.strerror or error}", "errno": error.errno or errno.EIO}
    kind = "" if isinstance(error, CheckpointError) else f"{type(error).__name__}: "
    return {"fault": f"{kind}{error}", "errno": None}


def _raised_elsewhere(rank: int, report: Mapping[str, Any]) -> OSError | CheckpointError:
    text = f"rank {rank} on {report['host']}: {report['fault']}"
    return CheckpointError(text) if report["errno"] is None else OSError(report["errno"], text)
