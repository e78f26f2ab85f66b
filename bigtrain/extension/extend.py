"""A run folder from another one whose tokenizer gets more tokens; written aside, and renamed when it is complete."""

from __future__ import annotations

import json
import os
import shutil
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any, NamedTuple

from bigtrain.checkpoint import manifest, tensors
from bigtrain.checkpoint.counts import read_counts
from bigtrain.checkpoint.folders import sync_folder
from bigtrain.checkpoint.lineage import Identity, recipe_hash
from bigtrain.checkpoint.lock import LOCK_FILE, check_unused, only_user_of
from bigtrain.checkpoint.resume import PLAN_FILE, stored_recipe
from bigtrain.checkpoint.state import OPTIMIZER, PLAN, STATE, TOKENIZER, WEIGHTS
from bigtrain.checkpoint.store import CheckpointStore, find_checkpoint
from bigtrain.checkpoint.stored import StoredTensors
from bigtrain.config.dump import to_yaml
from bigtrain.config.model import resolve_model
from bigtrain.config.schema import Recipe
from bigtrain.data.corpus import corpus_folder
from bigtrain.errors import CheckpointError, Fault, InputError
from bigtrain.extension.growth import Grown, Growth
from bigtrain.extension.tokenizers import Larger, larger_tokenizer

OUTPUT = "--output"


class Extended(NamedTuple):
    """A run that was extended: its folder, the step it is at, its tokens before and now, moments rounded anew."""

    folder: Path
    step: int
    before: int
    tokens: int
    rounded: int


def extend(run: Path, tokenizer: str, output: Path | None = None) -> Extended:
    """Make a run folder that goes on from a run or checkpoint with a larger vocabulary; the run stays as it is.

    `tokenizer` is a file, a folder or a hub id; `output` is RUN-extended without one. The new folder is at the same
    step, with the same tokens counted, and its step k reads global batch k of the data as the new tokenizer cuts them.
    Raises InputError for a tokenizer that does not add to the run's, an output that is there, data or a run that
    cannot be used, and ResumeError for a run that is under way.
    """
    run_dir = run.parent if (run / manifest.MANIFEST).is_file() else run
    run_dir = run_dir.resolve() if run_dir.name in ("", "..") else run_dir
    check_unused(run_dir)
    checkpoint = find_checkpoint(run)
    _check_has_state(checkpoint)
    target = output or run_dir.with_name(f"{run_dir.name}-extended")
    try:
        _check_free(target)
    except OSError as error:
        raise _refused(error, target) from error
    larger = larger_tokenizer(tokenizer, checkpoint / TOKENIZER)
    try:
        with _written_aside(target) as aside:
            return _extend(checkpoint, larger, aside, target)
    except OSError as error:
        raise _refused(error, target) from error


def _refused(error: OSError, target: Path) -> InputError:
    place = error.filename2 or error.filename or target  # of a rename, the new name
    text = f"{place}: {error.strerror or error}; make room there, or name another folder"
    return InputError(Fault("command line", OUTPUT, text))


def _extend(checkpoint: Path, larger: Larger, aside: Path, target: Path) -> Extended:
    made_with = stored_recipe(checkpoint)
    before = made_with.model.vocab_size
    assert isinstance(before, int)  # a stored recipe leaves nothing open
    tokens = max(before, larger.ids)
    tensors.write_bytes(aside / TOKENIZER, larger.text.encode())
    data = corpus_folder(_extended_recipe(made_with, aside / TOKENIZER, tokens)).name
    recipe = _extended_recipe(made_with, target.absolute() / TOKENIZER, tokens)
    counts = read_counts(checkpoint / STATE)
    grown = _grown(checkpoint, made_with, tokens, counts.get("optimizer_format") or made_with.optimizer.state)
    said = f"extended from {checkpoint}, which had {before} tokens"
    texts = {
        PLAN: to_yaml(recipe, {"": said}),
        TOKENIZER: larger.text,
        STATE: json.dumps(_on_other_data(counts, data)),
    }
    recipe_now = recipe_hash(recipe)
    store = CheckpointStore(aside, identity=Identity(recipe_now, data, frozenset([recipe_now])))
    store.save(counts["step"], grown.tensors, texts, grown.parts)
    tensors.write_bytes(aside / PLAN_FILE, texts[PLAN].encode())
    return Extended(target, counts["step"], before, tokens, grown.rounded)


def _extended_recipe(recipe: Recipe, tokenizer: Path, tokens: int) -> Recipe:
    model = recipe.model.model_copy(update={"vocab_size": tokens})
    data = recipe.data.model_copy(update={"tokenizer": str(tokenizer)})
    return recipe.model_copy(update={"model": model, "data": data})


def _grown(checkpoint: Path, recipe: Recipe, tokens: int, state_format: str) -> Grown:
    """Return the tensors of a checkpoint for so many tokens."""
    length = recipe.data.sequence_length
    shape = resolve_model(recipe.model, vocab_size=tokens, sequence_length=length)  # whose own vocabulary is written
    grown = Grown(Growth(shape, tokens))
    grown.add_weights(StoredTensors(checkpoint, WEIGHTS))
    grown.add_states(StoredTensors(checkpoint, OPTIMIZER), recipe, state_format)
    return grown


def _on_other_data(counts: dict[str, Any], data: str) -> dict[str, Any]:
    """Return the state of a run whose next row is one of other data.

    Losses are now over other tokens, and rows that were left out are others: what was noted of spikes is forgotten.
    """
    notes = {subject: kept for subject, kept in (counts.get("notes") or {}).items() if subject != "spikes"}
    return {**counts, "loader": {**counts["loader"], "corpus": data}, "notes": notes}


def _check_has_state(checkpoint: Path) -> None:
    """Raise CheckpointError for weights alone, such as an imported folder's."""
    if not {STATE, TOKENIZER} <= manifest.read(checkpoint)["files"].keys():
        text = "holds weights and no state of a run; start one from it with train.init_from, and extend that"
        raise CheckpointError(f"{checkpoint}: {text}")


def _check_free(target: Path) -> None:
    """Raise InputError for a place where something is; an empty folder is nothing."""
    is_empty_folder = target.is_dir() and not target.is_symlink() and not any(target.iterdir())
    if os.path.lexists(target) and not is_empty_folder:
        raise InputError(Fault("command line", OUTPUT, f"{target}: is there already; name another folder"))


@contextmanager
def _written_aside(target: Path) -> Iterator[Path]:
    """Give a folder that takes the target's name when the block ends well.

    What is left of it where the process is killed has a name of its own, which the next attempt takes over.
    """
    target = target.absolute()
    aside = target.with_name(f".{target.name}.aside")
    aside.mkdir(parents=True, exist_ok=True)
    with only_user_of(aside):
        try:
            _clear(aside)
            yield aside
            _check_free(target)
            aside.rename(target)
            sync_folder(target.parent)
        except BaseException:
            shutil.rmtree(aside, ignore_errors=True)
            raise


def _clear(folder: Path) -> None:
    for left in folder.iterdir():
        if left.is_dir() and not left.is_symlink():
            shutil.rmtree(left)
        elif left.name != LOCK_FILE:
            left.unlink()
