"""One run under way: its steps, and what is done every so many of them."""

from __future__ import annotations

import signal
import time
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from bigtrain.batch import Batch
from bigtrain.checkpoint.state import PLAN, TOKENIZER, TrainState
from bigtrain.checkpoint.store import CheckpointStore
from bigtrain.data.corpus import Corpus
from bigtrain.errors import BigtrainError, Interrupted, NodesChanged, NonFiniteGradient
from bigtrain.fault_points import reached
from bigtrain.planner.plan import Plan
from bigtrain.step_result import StepResult
from bigtrain.training.evaluate import Evaluation, evaluate_plan
from bigtrain.training.meter import Meter, Skips
from bigtrain.training.metrics import MetricsLog
from bigtrain.training.out_of_memory import memory_explained
from bigtrain.training.progress import RunProgress
from bigtrain.training.report import write_report
from bigtrain.training.runtime import NODES_SIGNAL, Runtime, seed_step


class Run:
    """One run under way: its state, and what is done every so many steps."""

    def __init__(
        self,
        plan: Plan,
        folder: Path,
        here: Runtime,
        corpus: Corpus,
        state: TrainState,
        store: CheckpointStore,
        peak: float,
    ) -> None:
        assert plan.total_steps is not None
        self.plan = plan
        self.folder = folder
        self.total_steps = plan.total_steps
        self._here = here
        self._corpus = corpus
        self._state = state
        self._store = store
        self._peak = peak
        self._texts = {PLAN: plan.to_yaml(), TOKENIZER: corpus.tokenizer_file.read_text(encoding="utf-8")}
        self._skips = Skips(late=here.device.type == "cuda")
        self._saved_at = time.monotonic()
        self._world = state.engine.world
        self._sharing = plan.recipe.sharding.tensor_parallel
        self._reader = self._world.reading(self._sharing)[0]
        """Those that share products draw the same random numbers, for the rows that they have in common."""
        self._new_tokens = 0
        """Tokens of this rank that `state.tokens`, of all ranks, does not count yet."""

    def finish(self) -> None:
        """Take the steps that are left, then evaluate, save and report."""
        recipe, state, first = self.plan.recipe, self._state, self._world.first
        log = MetricsLog(self.folder, step=state.step, trackers=list(recipe.logging.trackers)) if first else None
        self._meter = Meter(self.plan, self._peak, self._world, tokens=state.tokens)
        with RunProgress(self.total_steps, step=state.step, quiet=not first) as progress:
            self._log, self._progress = log, progress
            for line in (self._headline(), *self.plan.warnings):
                progress.say(line)
            try:
                self._take_steps()
            finally:
                state.loader.close()
                if log is not None:
                    log.close()
        if first:
            write_report(self.folder, self.plan)

    def _take_steps(self) -> None:
        state, skips = self._state, self._skips
        reached("start", state.step)
        for batch in state.loader:
            reached("data", state.step)
            with memory_explained(self.plan, state.engine):
                result = self._take_step(batch)
            stop = self._after_step(result)
            if skips.in_a_row > self.plan.recipe.train.max_skipped:
                many = f"{skips.in_a_row} steps in a row had a loss or gradient that is not finite (train.max_skipped)"
                raise BigtrainError(f"{many}; {self._last_good()}")
            if state.step >= self.total_steps:
                break
            if stop is not None:
                self._save()
                if stop == NODES_SIGNAL:
                    raise NodesChanged(f"saved step {state.step}, to go on with other nodes")
                raise Interrupted(f"{stop.name}: saved step {state.step}; launch again to go on")

    def _take_step(self, batch: Batch) -> StepResult:
        engine, step = self._state.engine, self._state.step
        seed_step(self.plan.recipe.seed, step, self._reader)
        for micro in engine.micro_batches(batch):
            reached("forward", step)
            output = engine.model(**micro)
            reached("backward", step)
            engine.backward(output)
        self._new_tokens += int(batch["document_lengths"].sum())
        reached("update", step)
        try:
            return engine.step(self.plan.recipe.train.max_grad_norm)
        except NonFiniteGradient as error:
            raise NonFiniteGradient(f"{error}; {self._last_good()}") from error

    def _after_step(self, result: StepResult) -> signal.Signals | None:
        """Log, evaluate and save where it is time; return the signal that any rank was asked to stop by."""
        recipe, step = self.plan.recipe, self._state.step
        last = step >= self.total_steps
        asked, late = self._world.max([self._here.stop_signal or 0, self._is_save_late()])
        self._meter.count()
        skipped = self._skips.add(result)
        self._progress.advance(step)
        if step % recipe.logging.every_steps == 0 or last or skipped:
            self._log_step(result)
        if recipe.train.eval_every and (step % recipe.train.eval_every == 0 or last):
            with self._meter.paused():
                self._evaluate()
        if last or late or (recipe.checkpoint.every_steps and step % recipe.checkpoint.every_steps == 0):
            with self._meter.paused():
                self._save()
        return signal.Signals(int(asked)) if asked else None

    def _log_step(self, result: StepResult) -> None:
        self._count_tokens()
        row = self._meter.row(result, self._state.step, self._state.tokens, self._skips.total)
        self._write(row)
        self._progress.log(row, self._meter.seconds_left(self.total_steps - self._state.step))

    def _evaluate(self) -> None:
        reached("evaluate", self._state.step)
        self._count_tokens()
        found = evaluate_plan(self._state.engine.model, self.plan, self._corpus, self._here.device)
        self._write({"step": self._state.step, "tokens": self._state.tokens, **found.row()})
        self._progress.say(describe(found, self._state.step, masked=self.plan.recipe.train.objective == "mlm"))

    def _write(self, row: Mapping[str, Any]) -> None:
        if self._log is not None:
            self._log.write(row)

    def _count_tokens(self) -> None:
        """Add what all ranks have seen since the last time."""
        self._state.tokens += int(self._world.sum([self._new_tokens])[0]) // self._sharing
        self._new_tokens = 0

    def _is_save_late(self) -> bool:
        minutes = self.plan.recipe.checkpoint.every_minutes
        return bool(minutes) and time.monotonic() - self._saved_at >= 60 * (minutes or 0)

    def _save(self) -> None:
        self._count_tokens()
        reached("save", self._state.step)
        self._state.save(self._store, self._texts)
        self._saved_at = time.monotonic()

    def _headline(self) -> str:
        plan, ranks = self.plan, self._world.size
        start = f"going on from step {self._state.step}" if self._state.step else "from new weights"
        return (
            f"{plan.recipe.name}: {plan.parameters:,} parameters, {self.total_steps} steps of "
            f"{plan.recipe.train.global_batch_size} rows x {plan.recipe.data.sequence_length} tokens in "
            f"{plan.accumulation_steps} micro-batches, on {f'{ranks} x ' if ranks > 1 else ''}{plan.hardware.name}, "
            f"{start}"
        )

    def _last_good(self) -> str:
        newest = self._store.newest()
        return f"the last good checkpoint is {newest}" if newest else "there is no checkpoint yet"


def describe(found: Evaluation, step: int, *, masked: bool) -> str:
    """Return an evaluation as a line for people."""
    accuracy = f"accuracy {found.accuracy:.1%}, " if masked else ""
    gain = found.unigram_loss - found.loss
    return (
        f"evaluation at step {step}: loss {found.loss:.4f}, {abs(gain):.2f} nat "
        f"{'better' if gain >= 0 else 'worse'} than token frequencies alone ({found.unigram_loss:.4f}), "
        f"{accuracy}perplexity {found.perplexity:.1f}"
    )
