"""What all ranks do at the same time, each its share, and which fails on all of them or on none."""

from __future__ import annotations

import json
import platform
from collections.abc import Callable, Mapping
from concurrent.futures import ThreadPoolExecutor, wait
from typing import Any

from bigtrain.errors import CheckpointError
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
        while world.any(not wait([task], timeout=PULSE_SECONDS).done):
            pass
    error = task.exception()
    told = {"host": platform.node(), **(_described(error) if error else {"result": task.result()})}
    reports = [json.loads(text) for text in world.gather(json.dumps(told))]
    if error is not None:
        raise error
    for rank, report in enumerate(reports):
        if "fault" in report:
            raise _raised_elsewhere(rank, report)
    return [json.loads(report["result"]) for report in reports]


def _described(error: BaseException) -> dict[str, Any]:
    if isinstance(error, OSError) and error.errno is not None:
        where = f"{error.filename}: " if error.filename else ""
        return {"fault": f"{where}{error.strerror}", "errno": error.errno}
    kind = "" if isinstance(error, CheckpointError) else f"{type(error).__name__}: "
    return {"fault": f"{kind}{error}", "errno": None}


def _raised_elsewhere(rank: int, report: Mapping[str, Any]) -> OSError | CheckpointError:
    text = f"rank {rank} on {report['host']}: {report['fault']}"
    return CheckpointError(text) if report["errno"] is None else OSError(report["errno"], text)
