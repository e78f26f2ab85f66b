"""Collectives on a CPU whose callers free what they held, so that what is measured is the same again.

Gloo copies what it gathers and reduces. The copies die with the last one to know them, the caller or a thread of
gloo's, as they happen to be scheduled: a peak would hold some of them or not, and a profile hears of no release in
threads that it did not start.
"""

from __future__ import annotations

import time
from collections.abc import Callable, Iterator
from contextlib import ExitStack, contextmanager
from typing import Any
from unittest.mock import patch

import torch.distributed as dist

PAUSE_SECONDS = 0.003
"""What a thread needs that only has to run; the caller sleeps, so that a core is free for it."""

COLLECTIVES = (
    "all_gather_into_tensor", "all_gather_single", "all_reduce", "all_to_all_single", "reduce_scatter_single",
    "reduce_scatter_tensor",
)  # fmt: skip
"""What `fully_shard` and `optim.exchange` call, by the names of all versions of torch that are supported."""


@contextmanager
def collectives_settled() -> Iterator[None]:
    """Let each collective's caller be the last one to know its copies, as long as this lasts."""
    with ExitStack() as patched:
        for name in COLLECTIVES:
            if hasattr(dist, name):
                patched.enter_context(patch.object(dist, name, _outliving(getattr(dist, name))))
        yield


def _outliving(collective: Callable[..., Any]) -> Callable[..., Any]:
    def called(*args: Any, async_op: bool = False, **kwargs: Any) -> Any:
        work = collective(*args, async_op=True, **kwargs)
        if async_op or work is None:  # of one rank there is nothing to wait for
            return work
        work.wait()
        time.sleep(PAUSE_SECONDS)
        return None

    return called
