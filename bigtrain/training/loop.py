"""From a plan to a finished run folder: what is checked, restored and written before the first step."""

from __future__ import annotations

import sys
from collections.abc import Iterator, Sequence
from contextlib import ExitStack, contextmanager
from os import PathLike
from pathlib import Path

from bigtrain.checkpoint import manifest
from bigtrain.checkpoint.lineage import identity, remember
from bigtrain.checkpoint.lock import only_user_of
from bigtrain.checkpoint.resume import PLAN_FILE, check_resume
from bigtrain.checkpoint.state import TOKENIZER, TrainState
from bigtrain.checkpoint.store import CheckpointStore, find_checkpoint
from bigtrain.config.trackers import check_trackers
from bigtrain.data.cache import cache_folder
from bigtrain.data.corpus import Corpus
from bigtrain.data.ensure import ensure_prepared
from bigtrain.errors import CheckpointError, Fault, ResumeError
from bigtrain.planner.plan import Plan
from bigtrain.terminal import tell
from bigtrain.training.alike import check_alike
from bigtrain.training.attention_choice import choose_attention
from bigtrain.training.build import build_engine, build_loader
from bigtrain.training.peak import peak_flops
from bigtrain.training.report import REPORT_FILE, write_report
from bigtrain.training.run import Run, lacks_evaluation
from bigtrain.training.run_files import changes_since, write_run_files
from bigtrain.training.runtime import runtime
from bigtrain.world import World, joined


def train(plan: Plan, run_dir: str | PathLike[str], *, allowed: Sequence[str] = ()) -> None:
    """Train in this process as a plan says, going on from the newest checkpoint of the run folder if there is one.

    `allowed` are recipe keys that may differ from those the run was started with. Raises InputError for a folder,
    data or checkpoints that cannot be used, Interrupted after a signal and a checkpoint.
    """
    folder = Path(run_dir)
    check_trackers(plan.recipe)
    started_as = check_resume(folder, plan.recipe, allowed)
    with ExitStack() as held:
        world = held.enter_context(joined(kind=plan.hardware.kind, timeout_seconds=plan.recipe.cluster.timeout))
        here = held.enter_context(runtime(plan))
        is_there = folder.is_dir()
        if world.first and is_there:
            held.enter_context(only_user_of(folder))
            started_as = check_resume(folder, plan.recipe, allowed)  # again: who had it meanwhile may have changed it
        peak = _peak_flops(plan, world)
        corpus = ensure_prepared(plan.recipe)
        check_alike(world, plan, corpus)
        loader = build_loader(plan, corpus, world)
        plan = plan.with_rows(loader.rows)
        engine = build_engine(plan)
        state = TrainState(engine, loader)
        known = identity(folder, plan.recipe, str(loader.state_dict()["corpus"]))
        store = CheckpointStore(folder, keep=plan.recipe.checkpoint.keep, world=world, identity=known)
        _start_from(state, store, plan, corpus, other_data=any(key.split(".")[0] == "data" for key in allowed))
        done = plan.total_steps is not None and state.step >= plan.total_steps
        if done and not world.any(world.first and lacks_evaluation(plan, folder, state.step)):
            if world.first:
                _tell_done(folder, plan, state.step)
            return
        attention = choose_attention(plan, state, world)
        if world.first:
            for line in attention:
                tell(line)
            if not is_there:
                held.enter_context(_made(folder))
            if started_as not in (None, folder / PLAN_FILE):
                print(f"{folder / PLAN_FILE}: damaged or gone; written anew, after {started_as}", file=sys.stderr)
            if state.step and (changes := changes_since(folder, plan)):
                tell(f"{folder}: going on with {changes}: losses may differ in their last digits")
            remember(folder, known)
            write_run_files(folder, plan)
        Run(plan, folder, here, corpus, state, store, world.size * peak).finish()


def _peak_flops(plan: Plan, world: World) -> float:
    """Return the rate of a device: the first rank's, which is measured while the others wait."""
    folder = cache_folder(plan.recipe.data)
    measured = repr(peak_flops(plan.hardware, plan.recipe.amp.precision, folder)) if world.first else ""
    return float(world.broadcast(measured))


@contextmanager
def _made(folder: Path) -> Iterator[None]:
    """Make a new run's folder and hold it. Raises ResumeError if another launch has used it meanwhile."""
    folder.mkdir(parents=True, exist_ok=True)
    with only_user_of(folder):
        if (folder / PLAN_FILE).exists() or manifest.step_folders(folder):
            raise ResumeError(f"{folder}: another launch has begun a run in it; launch again to go on with that")
        yield


def _tell_done(folder: Path, plan: Plan, step: int) -> None:
    asked = "" if step == plan.total_steps else f", and {plan.total_steps} are asked for"
    tell(f"{folder}: {step} steps are done already{asked}; for more, raise train.steps")
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
        store.set_aside_after(manifest.step_of(newest))  # those passed over, lest they stand where steps are saved anew
    elif source is not None:
        first = find_checkpoint(Path(source).expanduser(), state.engine.world)
        _check_tokenizer(first, corpus, plan, "train.init_from")
        state.load_weights(first, new_objective=True)
        if state.engine.world.first:
            model = plan.model
            shape = f"{model.family}, {model.num_hidden_layers} blocks of width {model.hidden_size}"
            tell(f"{store.run_dir}: starts from the weights of {first}: {shape}, {model.vocab_size} tokens")


def _check_tokenizer(checkpoint: Path, corpus: Corpus, plan: Plan, key: str) -> None:
    tokenizer = checkpoint / TOKENIZER
    if tokenizer.is_file() and tokenizer.read_bytes() != corpus.tokenizer_file.read_bytes():
        text = f"{checkpoint} was trained with another tokenizer; use data.tokenizer={tokenizer}"
        raise CheckpointError(Fault(plan.recipe.origin(key), key, text))
