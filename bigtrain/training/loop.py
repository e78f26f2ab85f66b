"""The training loop, from a plan to a finished run folder."""

from __future__ import annotations

import platform
import shutil
import subprocess
import sys
import time
from collections.abc import Iterable, Sequence
from contextlib import ExitStack
from importlib import metadata
from os import PathLike
from pathlib import Path
from typing import Any

import torch
from torch import nn
from torch.optim import Optimizer

import bigtrain
from bigtrain.batch import Batch
from bigtrain.checkpoint.resume import PLAN_FILE, check_resume
from bigtrain.checkpoint.state import PLAN, TOKENIZER, TrainState, load_weights
from bigtrain.checkpoint.store import CheckpointStore, find_checkpoint, only_user_of
from bigtrain.data.cache import cache_folder, write_json, written_aside
from bigtrain.data.corpus import Corpus
from bigtrain.data.ensure import ensure_prepared
from bigtrain.data.loader import Loader
from bigtrain.engine import Engine, StepResult, prepare
from bigtrain.errors import BigtrainError, CheckpointError, Fault, Interrupted, NonFiniteGradient
from bigtrain.models.build import build_model
from bigtrain.optim.build import build_optimizer
from bigtrain.placement import find_blocks
from bigtrain.planner.plan import Plan
from bigtrain.training.evaluate import Evaluation, evaluate_plan
from bigtrain.training.meter import Meter, Skips
from bigtrain.training.metrics import MetricsLog
from bigtrain.training.out_of_memory import memory_explained
from bigtrain.training.peak import peak_flops
from bigtrain.training.progress import RunProgress
from bigtrain.training.report import REPORT_FILE, write_report
from bigtrain.training.runtime import Runtime, runtime, seed_step

DEPENDENCIES = ("torch", "numpy", "tokenizers")
"""Whose versions a result depends on."""


def train(plan: Plan, run_dir: str | PathLike[str], *, allowed: Sequence[str] = ()) -> None:
    """Train in this process as a plan says, going on from the newest checkpoint of the run folder if there is one.

    `allowed` are recipe keys that may differ from those the run was started with. Raises InputError for a folder,
    data or checkpoints that cannot be used, Interrupted after a signal and a checkpoint.
    """
    folder = Path(run_dir)
    check_resume(folder, plan.recipe, allowed)
    with runtime(plan) as here, ExitStack() as held:
        if folder.is_dir():
            held.enter_context(only_user_of(folder))
        peak = peak_flops(plan.hardware, plan.recipe.amp.precision, cache_folder(plan.recipe.data))
        corpus = ensure_prepared(plan.recipe)
        loader = build_loader(plan, corpus)
        plan = plan.with_rows(loader.rows)
        engine = build_engine(plan)
        state = TrainState(engine, loader)
        store = CheckpointStore(folder, keep=plan.recipe.checkpoint.keep)
        _start_from(state, store, plan, corpus, other_data=any(key.split(".")[0] == "data" for key in allowed))
        if plan.total_steps is not None and state.step >= plan.total_steps:
            print(f"{folder}: its {plan.total_steps} steps are done already", flush=True)
            if not (folder / REPORT_FILE).is_file():
                write_report(folder, plan)
            return
        if not folder.is_dir():
            folder.mkdir(parents=True)
            held.enter_context(only_user_of(folder))
        write_run_files(folder, plan)
        Run(plan, folder, here, corpus, state, store, peak).finish()


def build_loader(plan: Plan, corpus: Corpus) -> Loader:
    """Return the training rows of a corpus, as a plan's recipe says."""
    recipe = plan.recipe
    return Loader(
        corpus,
        split="train",
        objective=recipe.train.objective,
        sequence_length=recipe.data.sequence_length,
        packing=recipe.data.packing,
        masking_probability=recipe.train.masking_probability,
        global_batch_size=recipe.train.global_batch_size,
        seed=recipe.seed,
    )


def build_engine(plan: Plan) -> Engine:
    """Return the engine of a plan's own model, initialised from the recipe's seed."""
    with torch.device("meta"):
        model = build_plan_model(plan)

    def optimizer(parameters: Iterable[nn.Parameter]) -> Optimizer:
        matrices = [p for block in find_blocks(model) for p in block.parameters() if p.ndim == 2]
        return build_optimizer(
            parameters, plan.recipe.optimizer, master_weights=plan.recipe.amp.master_weights, matrices=matrices
        )

    return prepare(model, plan, optimizer)


def build_plan_model(plan: Plan) -> nn.Module:
    """Return a plan's model, on the device that is current."""
    section = plan.recipe.train
    model = build_model(
        plan.model,
        dropout=section.dropout,
        attention_dropout=section.attention_dropout,
        z_loss=section.z_loss,
        label_smoothing=section.label_smoothing,
    )
    model.loss_chunk_tokens = plan.loss_chunk_tokens
    return model


def write_run_files(folder: Path, plan: Plan) -> None:
    """Write plan.yaml and env.json."""
    with written_aside(folder / PLAN_FILE) as file:
        file.write(plan.to_yaml().encode())
    write_json(folder / "env.json", environment(plan))


def environment(plan: Plan) -> dict[str, Any]:
    """Return what a result depends on besides the recipe: versions, device, command, revision."""
    return {
        "python": platform.python_version(),
        "versions": {"bigtrain": bigtrain.__version__, **{name: metadata.version(name) for name in DEPENDENCIES}},
        "device": plan.hardware.name,
        "threads": torch.get_num_threads(),
        "command": sys.argv,
        "git_revision": git_revision(),
    }


def git_revision() -> str | None:
    """Return the revision of the checkout that bigtrain runs from; None for an installed package, or without git."""
    checkout = Path(__file__).parents[2]
    if not (checkout / ".git").exists() or shutil.which("git") is None:
        return None
    found = subprocess.run(["git", "rev-parse", "HEAD"], capture_output=True, text=True, cwd=checkout, check=False)
    return found.stdout.strip() or None


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
        first = find_checkpoint(Path(source).expanduser())
        _check_tokenizer(first, corpus, plan, "train.init_from")
        load_weights(state.engine.model, first)


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

    def finish(self) -> None:
        """Take the steps that are left, then evaluate, save and report."""
        recipe, state = self.plan.recipe, self._state
        log = MetricsLog(self.folder, step=state.step, trackers=list(recipe.logging.trackers))
        self._meter = Meter(self.plan, self._peak, tokens=state.tokens)
        with RunProgress(self.total_steps, step=state.step) as progress:
            self._log, self._progress = log, progress
            for line in (self._headline(), *self.plan.warnings):
                progress.say(line)
            try:
                self._take_steps()
            finally:
                state.loader.close()
                log.close()
        write_report(self.folder, self.plan)

    def _take_steps(self) -> None:
        state, skips = self._state, self._skips
        for batch in state.loader:
            with memory_explained(self.plan, state.engine):
                result = self._take_step(batch)
            self._after_step(result)
            if skips.in_a_row > self.plan.recipe.train.max_skipped:
                many = f"{skips.in_a_row} steps in a row had a loss or gradient that is not finite (train.max_skipped)"
                raise BigtrainError(f"{many}; {self._last_good()}")
            if state.step >= self.total_steps:
                break
            if self._here.stop_signal is not None:
                self._save()
                raise Interrupted(f"{self._here.stop_signal.name}: saved step {state.step}; launch again to go on")

    def _take_step(self, batch: Batch) -> StepResult:
        engine = self._state.engine
        seed_step(self.plan.recipe.seed, self._state.step)
        for micro in engine.micro_batches(batch):
            engine.backward(engine.model(**micro))
        self._state.tokens += int(batch["document_lengths"].sum())
        try:
            return engine.step(self.plan.recipe.train.max_grad_norm)
        except NonFiniteGradient as error:
            raise NonFiniteGradient(f"{error}; {self._last_good()}") from error

    def _after_step(self, result: StepResult) -> None:
        recipe, step = self.plan.recipe, self._state.step
        last = step >= self.total_steps
        self._meter.count()
        skipped = self._skips.add(result)
        self._progress.advance(step)
        if step % recipe.logging.every_steps == 0 or last or skipped:
            row = self._meter.row(result, step, self._state.tokens, self._skips.total)
            self._log.write(row)
            self._progress.log(row, self._meter.seconds_left(self.total_steps - step))
        if recipe.train.eval_every and (step % recipe.train.eval_every == 0 or last):
            with self._meter.paused():
                self._evaluate()
        if last or self._is_save_due():
            with self._meter.paused():
                self._save()

    def _evaluate(self) -> None:
        found = evaluate_plan(self._state.engine.model, self.plan, self._corpus, self._here.device)
        self._log.write({"step": self._state.step, "tokens": self._state.tokens, **found.row()})
        self._progress.say(describe(found, self._state.step, masked=self.plan.recipe.train.objective == "mlm"))

    def _is_save_due(self) -> bool:
        section = self.plan.recipe.checkpoint
        if section.every_steps and self._state.step % section.every_steps == 0:
            return True
        return bool(section.every_minutes) and time.monotonic() - self._saved_at >= 60 * (section.every_minutes or 0)

    def _save(self) -> None:
        self._state.save(self._store, self._texts)
        self._saved_at = time.monotonic()

    def _headline(self) -> str:
        plan = self.plan
        start = f"going on from step {self._state.step}" if self._state.step else "from new weights"
        return (
            f"{plan.recipe.name}: {plan.parameters:,} parameters, {self.total_steps} steps of "
            f"{plan.recipe.train.global_batch_size} rows x {plan.recipe.data.sequence_length} tokens in "
            f"{plan.accumulation_steps} micro-batches, on {plan.hardware.name}, {start}"
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
