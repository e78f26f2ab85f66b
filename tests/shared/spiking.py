"""Runs in which the loss of certain global batches is twenty times what it would be, whenever they come."""

from __future__ import annotations

from collections.abc import Iterator
from hashlib import sha256
from itertools import islice
from typing import Any

from bigtrain.batch import Batch
from bigtrain.data.ensure import ensure_prepared
from bigtrain.engine import Engine
from bigtrain.planner.plan import Plan
from bigtrain.training import run, spike
from bigtrain.training.build import build_loader

WINDOW = 6


def digest(batch: Batch) -> str:
    return sha256(batch["input_ids"].numpy().tobytes()).hexdigest()


def order_of(plan: Plan, batches: int) -> list[str]:
    """Return the digests of the first batches that one process reads."""
    loader = build_loader(plan, ensure_prepared(plan.recipe))
    try:
        return [digest(batch) for batch in islice(loader, batches)]
    finally:
        loader.close()


class Rows:
    """What was read, in its order, each batch as a digest of its tokens; those in `bad` spike, from `bad_from` on all.

    `seen` holds the steps taken before, too.
    """

    def __init__(self, monkeypatch: Any) -> None:
        self.seen: list[tuple[int, str]] = []
        self.bad: set[str] = set()
        self.bad_from: int | None = None
        self._spikes = False
        plain = Engine.micro_batches

        def micro_batches(engine: Engine, batch: Batch) -> Iterator[Batch]:
            read = digest(batch)
            self.seen.append((engine.steps_taken, read))
            late = self.bad_from is not None and engine.steps_taken >= self.bad_from
            self._spikes = read in self.bad or late
            return plain(engine, batch)

        monkeypatch.setattr(Engine, "micro_batches", micro_batches)
        monkeypatch.setattr(run, "changed", self._changed)
        monkeypatch.setattr(spike, "WINDOW", WINDOW)

    def _changed(self, output: Any, _: int) -> Any:
        return getattr(output, "loss", output) * 20 if self._spikes else output

    @property
    def read(self) -> list[str]:
        return [digest for _, digest in self.seen]
