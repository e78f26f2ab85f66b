"""One run under way: its steps, and what is done every so many of them."""

from __future__ import annotations

import signal
import time
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from bigtrain.batch import Batch
from bigtrain.checkpoint.state import PLAN, TOKENIZER, TrainState
from bigtrain.checkpoint.store import CheckpointStore
from bigtrain.data.corpus import Corpus
from bigtrain.errors import BigtrainError, Interrupted, NodesChanged, NonFiniteGradient
from bigtrain.heartbeat import enter
from bigtrain.planner.plan import Plan
from bigtrain.step_result import StepResult
from bigtrain.training.dashboard import story_of
from bigtrain.training.evaluate import describe, evaluate_plan
from bigtrain.training.injected import changed, flip_asked_bit
from bigtrain.training.late_rows import LateRows, reads_late
from bigtrain.training.meter import Due, Meter, Skips
from bigtrain.training.metrics import MetricsLog, read_metrics
from bigtrain.training.out_of_memory import memory_explained
from bigtrain.training.progress import RunProgress
from bigtrain.training.replicas import Replicas
from bigtrain.training.report import write_report
from bigtrain.training.runtime import NODES_SIGNAL, Runtime, seed_step
from bigtrain.training.samples import Samples, describe_sample
from bigtrain.training.saving import saver_for, saving_lines
from bigtrain.training.spike_policy import SpikePolicy
from bigtrain.training.straggler import Stragglers, row_of
from bigtrain.training.tracking import Trackers


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
        self._saver = saver_for(plan, store, state.engine.world)
        self._peak = peak
        self._texts = {PLAN: plan.to_yaml(), TOKENIZER: corpus.tokenizer_file.read_text(encoding="utf-8")}
        late = reads_late(here.device)
        self._skips = Skips(late=late, **state.notes.get("skips", {}))
        self._rows = LateRows(self._tell_row, late=late)
        self._saved_at = time.monotonic()
        self._world = state.engine.world
        self._sharing = plan.recipe.sharding.tensor_parallel
        self._reader = self._world.reading(self._sharing)[0]
        """Those that share products draw the same random numbers, for the rows that they have in common."""
        every_steps = plan.recipe.checkpoint.every_steps
        self._on_spike = SpikePolicy(plan.recipe.train.on_spike, state, self._saver, every_steps=every_steps)
        self._replicas = Replicas(plan, state.engine, self._saver.last_good)
        self._stragglers = Stragglers(self._world)
        self._samples = Samples(plan, corpus, folder) if plan.recipe.logging.sample_every else None
        self._new_tokens = 0
        """Tokens of this rank that `state.tokens`, of all ranks, does not count yet."""

    def finish(self) -> None:
        """Take the steps that are left, then evaluate, save and report."""
        state, first = self._state, self._world.first
        self._log = self._open_log()
        if self._samples is not None and first:
            self._samples.go_back(state.step)
        self._meter = Meter(self.plan, self._peak, self._world, tokens=state.tokens)
        with RunProgress(self.total_steps, step=state.step, quiet=not first) as progress:
            self._progress = progress
            lines = (*self.plan.warnings, *saving_lines(self.plan, self.folder), *self._replicas.lines())
            for line in (self._headline(), *lines):
                progress.say(line)
            try:
                if self._world.any(first and lacks_evaluation(self.plan, self.folder, state.step)):
                    self._evaluate()
                if state.step < self.total_steps:
                    with self._stragglers.watched():
                        self._take_steps()
            except BigtrainError:
                self._rows.settle()
                raise
            finally:
                self._saver.close()
                state.loader.close()
                if self._log is not None:
                    self._log.close()
        if first:
            write_report(self.folder, self.plan)

    def _open_log(self) -> MetricsLog | None:
        if not self._world.first:
            return None
        names: list[str] = list(self.plan.recipe.logging.trackers)
        others = Trackers(names, story_of(self.plan, self.folder))
        return MetricsLog(self.folder, step=self._state.step, trackers=names, others=others)

    def _take_steps(self) -> None:
        state, skips = self._state, self._skips
        enter("start", state.step)
        for batch in state.loader:
            enter("data", state.step)
            with memory_explained(self.plan, state.engine):
                result = self._take_step(batch)
            stop = self._after_step(result)
            if skips.in_a_row > self.plan.recipe.train.max_skipped:
                why = "had a loss or gradient that is not finite, or a spike (train.max_skipped)"
                raise BigtrainError(f"{skips.in_a_row} steps in a row {why}; {self._last_good()}")
            if state.step >= self.total_steps:
                break
            if stop is not None:
                self._save(must=True)
                if stop == NODES_SIGNAL:
                    raise NodesChanged(f"saved step {state.step}, to go on with other nodes")
                raise Interrupted(f"{stop.name}: saved step {state.step}; launch again to go on")

    def _take_step(self, batch: Batch) -> StepResult:
        engine, step = self._state.engine, self._state.step
        seed_step(self.plan.recipe.seed, step, self._reader)
        for micro in engine.micro_batches(batch):
            enter("forward", step)
            output = engine.model(**micro)
            enter("backward", step)
            engine.backward(changed(output, step))
        self._new_tokens += int(batch["document_lengths"].sum())
        enter("update", step)
        self._replicas.before_update()
        self._on_spike.before_update()
        try:
            return engine.step(self.plan.recipe.train.max_grad_norm)
        except NonFiniteGradient as error:
            raise NonFiniteGradient(f"{error}; {self._last_good()}") from error

    def _after_step(self, result: StepResult) -> signal.Signals | None:
        """Log, evaluate and save where it is time; return the signal that any rank was asked to stop by."""
        recipe, step = self.plan.recipe, self._state.step
        last = step >= self.total_steps
        flip_asked_bit(self._state.engine.parameters.values(), step)
        told = (self._here.stop_signal or 0, self._is_save_late(), self._replicas.flipped)
        asked, late, flipped = self._world.max(told)
        if flipped:
            self._replicas.tell_flipped()
        self._rows.settle()
        self._meter.count()
        skipped = self._skips.add(result)
        self._progress.advance(step)
        if step % recipe.logging.every_steps == 0 or last or skipped:
            self._log_step(result)
        self._look_for_straggler()
        if self._goes_back(result):
            return signal.Signals(int(asked)) if asked else None
        self._replicas.check_if_due()
        # Before it is saved: a run that goes on from here has its samples of this step.
        if self._samples is not None and step % (recipe.logging.sample_every or 1) == 0 and not asked:
            with self._aside():
                self._sample(self._samples)
        # Saved first: an evaluation that fails, or is killed, takes no step with it, and is made up for.
        if last or late or (recipe.checkpoint.every_steps and step % recipe.checkpoint.every_steps == 0):
            with self._aside():
                self._save(must=last)
        if is_evaluated(self.plan, step) and (last or not asked):
            with self._aside():
                self._evaluate()
        return signal.Signals(int(asked)) if asked else None

    @contextmanager
    def _aside(self) -> Iterator[None]:
        """Leave what is done inside out of what steps take."""
        self._rows.settle()
        with self._meter.paused(), self._stragglers.paused():
            yield

    def _look_for_straggler(self) -> None:
        found = self._stragglers.step()
        if found is not None:
            self._rows.settle()
            self._progress.say(f"step {self._state.step}: {found}")
            self._write(row_of(found, self._state.step, self._state.tokens))

    def _goes_back(self, result: StepResult) -> bool:
        """Do what `train.on_spike` says if the step was a spike; return whether the state is now an earlier one."""
        state, found = self._state, self._on_spike.after_update(result)
        if found is None:
            return False
        self._rows.settle()
        if found.back_to is not None:
            if self._log is not None:
                self._log.go_back(state.step)
                if self._samples is not None:
                    self._samples.go_back(state.step)
            self._new_tokens = 0
            self._meter.go_on_from(state.tokens)
            self._replicas.forget()
        self._progress.say(str(found))
        self._write(found.row(state.tokens))
        return found.back_to is not None

    def _log_step(self, result: StepResult) -> None:
        self._count_tokens()
        self._rows.add(self._meter.due(result, self._state.step, self._state.tokens, self._skips.total))

    def _tell_row(self, due: Due) -> None:
        row = self._meter.row_of(due)
        self._write(row)
        self._progress.log(row, self._meter.seconds_left(self.total_steps - due.step))

    def _evaluate(self) -> None:
        enter("evaluate", self._state.step)
        self._count_tokens()
        found = evaluate_plan(self._state.engine.model, self.plan, self._corpus, self._here.device)
        self._write({"step": self._state.step, "tokens": self._state.tokens, **found.row()})
        self._progress.say(describe(found, self._state.step, masked=self.plan.recipe.train.objective != "clm"))

    def _sample(self, samples: Samples) -> None:
        enter("evaluate", self._state.step)
        taken = samples.take(self._state.engine.model, self._state.step, self._here.device)
        if self._log is not None:
            samples.write(taken)
            for number, row in enumerate(taken, 1):
                self._log.write_text(f"sample {number}", f"{row['prompt']} -> {row['text']}", row["step"])
            self._progress.say(describe_sample(taken))

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

    def _save(self, *, must: bool = False) -> None:
        """Save, or begin to; where it must be, wait until it is on the disk, or raise BigtrainError."""
        self._rows.settle()
        self._count_tokens()
        enter("save", self._state.step)
        self._replicas.check()
        self._state.notes["skips"] = self._skips.state_dict()
        if not self._saver.has(self._state.step):
            self._state.save(self._saver, self._texts)
        if must:
            self._saver.require(self._state.step)
        self._saved_at = time.monotonic()

    def _headline(self) -> str:
        plan, ranks = self.plan, self._world.size
        weights = "given" if plan.recipe.train.init_from else "new"
        start = f"going on from step {self._state.step}" if self._state.step else f"from {weights} weights"
        return (
            f"{plan.recipe.name}: {plan.parameters:,} parameters, {self.total_steps} steps of "
            f"{plan.recipe.train.global_batch_size} rows x {plan.recipe.data.sequence_length} tokens in "
            f"{plan.accumulation_steps} micro-batches, on {f'{ranks} x ' if ranks > 1 else ''}{plan.hardware.name}, "
            f"{start}"
        )

    def _last_good(self) -> str:
        return self._saver.last_good()


def is_evaluated(plan: Plan, step: int) -> bool:
    """Tell whether an evaluation belongs after a step."""
    every = plan.recipe.train.eval_every
    return bool(every) and step > 0 and (step % (every or 1) == 0 or step == plan.total_steps)


def lacks_evaluation(plan: Plan, folder: Path, step: int) -> bool:
    """Tell whether the evaluation after a step that was saved is not in the run's metrics: the run ended before it."""
    if not is_evaluated(plan, step):
        return False
    return not any(row["step"] == step and "eval_loss" in row for row in read_metrics(folder))
