"""The training loop, from a plan to a finished run folder."""

from __future__ import annotations

import signal
import time
from collections.abc import Mapping, Sequence
from contextlib import ExitStack
from os import PathLike
from pathlib import Path
from typing import Any

from bigtrain.batch import Batch
from bigtrain.checkpoint.resume import check_resume
from bigtrain.checkpoint.state import PLAN, TOKENIZER, TrainState
from bigtrain.checkpoint.store import CheckpointStore, find_checkpoint, only_user_of
from bigtrain.data.cache import cache_folder
from bigtrain.data.corpus import Corpus
from bigtrain.data.ensure import ensure_prepared
from bigtrain.errors import BigtrainError, CheckpointError, Fault, Interrupted, NodesChanged, NonFiniteGradient
from bigtrain.planner.plan import Plan
from bigtrain.step_result import StepResult
from bigtrain.training.alike import check_alike
from bigtrain.training.build import build_engine, build_loader
from bigtrain.training.evaluate import Evaluation, evaluate_plan
from bigtrain.training.meter import Meter, Skips
from bigtrain.training.metrics import MetricsLog
from bigtrain.training.out_of_memory import memory_explained
from bigtrain.training.peak import peak_flops
from bigtrain.training.progress import RunProgress
from bigtrain.training.report import REPORT_FILE, write_report
from bigtrain.training.run_files import write_run_files
from bigtrain.training.runtime import NODES_SIGNAL, Runtime, runtime, seed_step
from bigtrain.world import World, joined


def train(plan: Plan, run_dir: str | PathLike[str], *, allowed: Sequence[str] = ()) -> None:
    """Train in this process as a plan says, going on from the newest checkpoint of the run folder if there is one.

    `allowed` are recipe keys that may differ from those the run was started with. Raises InputError for a folder,
    data or checkpoints that cannot be used, Interrupted after a signal and a checkpoint.
    """
    folder = Path(run_dir)
    check_resume(folder, plan.recipe, allowed)
    with ExitStack() as held:
        world = held.enter_context(joined(kind=plan.hardware.kind, timeout_seconds=plan.recipe.cluster.timeout))
        here = held.enter_context(runtime(plan))
        if world.first and folder.is_dir():
            held.enter_context(only_user_of(folder))
        peak = _peak_flops(plan, world)
        corpus = ensure_prepared(plan.recipe)
        check_alike(world, plan, corpus)
        loader = build_loader(plan, corpus, world)
        plan = plan.with_rows(loader.rows)
        engine = build_engine(plan)
        state = TrainState(engine, loader)
        store = CheckpointStore(folder, keep=plan.recipe.checkpoint.keep, world=world)
        _start_from(state, store, plan, corpus, other_data=any(key.split(".")[0] == "data" for key in allowed))
        if plan.total_steps is not None and state.step >= plan.total_steps:
            if world.first:
                _tell_done(folder, plan)
            return
        if world.first:
            if not folder.is_dir():
                folder.mkdir(parents=True)
                held.enter_context(only_user_of(folder))
            write_run_files(folder, plan)
        Run(plan, folder, here, corpus, state, store, world.size * peak).finish()


def _peak_flops(plan: Plan, world: World) -> float:
    """Return the rate of a device: the first rank's, which is measured while the others wait."""
    folder = cache_folder(plan.recipe.data)
    measured = repr(peak_flops(plan.hardware, plan.recipe.amp.precision, folder)) if world.first else ""
    return float(world.broadcast(measured))


def _tell_done(folder: Path, plan: Plan) -> None:
    print(f"{folder}: its {plan.total_steps} steps are done already", flush=True)
    if not (folder / REPORT_FILE).is_file():
        write_report(folder, plan)


def _start_from(state: TrainState, store: CheckpointStore, plan: Plan, corpus: Corpus, *, other_data: bool) -> None:
    """Restore the newest checkpoint of the run; a new run takes over the weights of `train.init_from`, if any.

    Raises CheckpointError if the weights were trained with another tokenizer: their tokens would mean other words.
    """
    newest, source = store.newest(), plan.recipe.train.init_from
    if newest is not None:
        if other_data:
            _check_tokenizer(newest, corpus, plan, "data.source")
        state.restore(newest, other_data=other_data)
    elif source is not None:
        first = find_checkpoint(Path(source).expanduser(), state.engine.world)
        _check_tokenizer(first, corpus, plan, "train.init_from")
        state.load_weights(first)


def _check_tokenizer(checkpoint: Path, corpus: Corpus, plan: Plan, key: str) -> None:
    tokenizer = checkpoint / TOKENIZER
    if tokenizer.is_file() and tokenizer.read_bytes() != corpus.tokenizer_file.read_bytes():
        text = f"{checkpoint} was trained with another tokenizer; use data.tokenizer={tokenizer}"
        raise CheckpointError(Fault(plan.recipe.origin(key), key, text))


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
        for batch in state.loader:
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
        engine = self._state.engine
        seed_step(self.plan.recipe.seed, self._state.step, self._reader)
        for micro in engine.micro_batches(batch):
            engine.backward(engine.model(**micro))
        self._new_tokens += int(batch["document_lengths"].sum())
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
