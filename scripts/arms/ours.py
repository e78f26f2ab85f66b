"""The arm `bigtrain`: the loop that `bigtrain launch` runs, its engine's methods timed from outside."""

from __future__ import annotations

import time
from collections.abc import Callable, Iterator
from contextlib import ExitStack, suppress
from pathlib import Path
from tempfile import TemporaryDirectory
from types import SimpleNamespace
from typing import Any
from unittest.mock import patch

from arms.clock import Clock
from arms.job import Job
from arms.rows import Source


class Enough(Exception):
    """The timed steps are over."""


class Given:
    """Batches that are there already, with the face of a loader."""

    def __init__(self, batches: list[dict[str, Any]]) -> None:
        self._batches = batches
        self.rows = sum(len(batch["input_ids"]) for batch in batches)
        self.position = 0

    def __iter__(self) -> Iterator[dict[str, Any]]:
        for batch in self._batches:
            self.position += 1
            yield batch

    def state_dict(self) -> dict[str, Any]:
        """Return the position, of no corpus."""
        return {"row": self.position, "corpus": "none"}

    def close(self) -> None:
        """Hold nothing that would need it."""


class Counted:
    """A loader that counts the tokens of the batches it gives."""

    def __init__(self, loader: Any) -> None:
        self._loader = loader
        self.tokens: list[int] = []

    def __iter__(self) -> Iterator[Any]:
        for batch in self._loader:
            self.tokens.append(int(batch["document_lengths"].sum()))
            yield batch

    def __getattr__(self, name: str) -> Any:
        return getattr(self._loader, name)


def run(job: Job) -> dict[str, Any]:
    """Train as the job says."""
    return train(job.plan(), job)


def train(plan: Any, job: Job) -> dict[str, Any]:
    """Train a plan as the shipped command does, until the job's steps are timed; of the job, its mode and steps count.

    Only where the loop takes its corpus, its rows and its engine from is replaced: rows that are drawn need no corpus.
    """
    from bigtrain.training import loop
    from bigtrain.training.build import build_engine, build_loader

    held: dict[str, Any] = {}
    clock = Clock(plan.hardware.kind, job.steps)

    def rows_of(*arguments: Any) -> Any:
        given: Any = build_loader(*arguments) if job.mode == "loader" else Given(Source(plan, job).packed())
        held["rows"] = Counted(given)
        return held["rows"]

    def engine_of(*arguments: Any) -> Any:
        engine = build_engine(*arguments)
        held["spent"] = Spent(engine, clock)
        return engine

    with TemporaryDirectory() as name, ExitStack() as stack:
        replaced: dict[str, Any] = {"build_loader": rows_of, "build_engine": engine_of}
        if job.mode != "loader":
            replaced["ensure_prepared"] = lambda _recipe: _no_corpus(Path(name))
        for called, instead in replaced.items():
            stack.enter_context(patch.object(loop, called, instead))
        with suppress(Enough):
            loop.train(plan, Path(name, "run"))
    found = clock.result(held["rows"].tokens)
    share = None if plan.hardware.kind == "cuda" else held["spent"].outside_share(found["step_seconds"])
    return {**found, "outside_share": share}


class Spent:
    """Seconds of each step inside the model's forward, the backward and the optimizer, by the host's clock.

    What is left of a step is the loader, the unpadding of rows, metrics and Python. A thread that reads ahead meanwhile
    slows what is inside. On CUDA the host does not wait, so that its clock tells nothing.
    """

    def __init__(self, engine: Any, clock: Clock) -> None:
        self._clock = clock
        self._steps: list[float] = []
        self._inside = self._begin = 0.0
        engine.model.register_forward_pre_hook(lambda *_: self._enter())
        engine.model.register_forward_hook(lambda *_: self._leave())
        engine.backward = self._timed(engine.backward)
        engine.step = self._ending(self._timed(engine.step))

    def outside_share(self, step_seconds: list[float]) -> float:
        """Return the share of the timed steps' time that was spent outside."""
        return 1 - sum(self._steps[-len(step_seconds) :]) / sum(step_seconds)

    def _enter(self) -> None:
        self._begin = time.perf_counter()

    def _leave(self) -> None:
        self._inside += time.perf_counter() - self._begin

    def _timed(self, method: Callable[..., Any]) -> Callable[..., Any]:
        def timed(*arguments: Any) -> Any:
            self._enter()
            try:
                return method(*arguments)
            finally:
                self._leave()

        return timed

    def _ending(self, method: Callable[..., Any]) -> Callable[..., Any]:
        def ending(*arguments: Any) -> Any:
            result = method(*arguments)
            self._steps.append(self._inside)
            self._inside = 0.0
            if self._clock.step(result.loss):
                raise Enough
            return result

        return ending


def _no_corpus(folder: Path) -> Any:
    tokenizer = folder / "tokenizer.json"
    tokenizer.write_text("{}", encoding="utf-8")
    return SimpleNamespace(tokenizer_file=tokenizer, folder=folder)
