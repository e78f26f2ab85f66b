"""Tokenize a source once: documents into shards, a part at a time, so that an interrupted run goes on where it was."""

from __future__ import annotations

import math
import shutil
from collections.abc import Iterable, Iterator, Sequence
from contextlib import ExitStack, closing
from dataclasses import asdict
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np

from bigtrain.config.schema import DataSection, Recipe
from bigtrain.data.background import ReadAhead
from bigtrain.data.batches import Batch, batches
from bigtrain.data.cache import file_digest, locked, write_json, written_aside
from bigtrain.data.corpus import (
    MANIFEST,
    SPLITS,
    TOKENIZER,
    UNIGRAM_COUNTS,
    Corpus,
    corpus_facts,
    corpus_folder,
    is_prepared,
    open_corpus,
)
from bigtrain.data.decoding import Meter, data_error
from bigtrain.data.mixing import build_mixture
from bigtrain.data.packing import RowIndex, require_length
from bigtrain.data.part import Frame, PartWriter, total_counts
from bigtrain.data.progress import Progress
from bigtrain.data.reading import Reading, is_streamed, mark_of
from bigtrain.data.selection import Selection, left_out_text
from bigtrain.data.sources import identity, total_bytes
from bigtrain.data.unfinished import State, files_of, finish, forget, resumed, seen_before
from bigtrain.data.vocabulary import TOKENIZER_KEY
from bigtrain.errors import DataError
from bigtrain.units import format_count, format_seconds

if TYPE_CHECKING:
    from tokenizers import Encoding, Tokenizer

    from bigtrain.data.toolkit import Toolkit

SHARD_TOKENS = 2**26
"""A part ends with the batch that reaches this; it is the most that an interruption costs."""


def prepare(recipe: Recipe, show_progress: bool = True) -> Corpus:
    """Tokenize a recipe's source in this process, unless that was done, and pack its rows; return the corpus.

    Waits for another process that prepares the same; goes on after the last finished shard of an interrupted one.
    Raises DataError for whatever is wrong with the source or the tokenizer.
    """
    length, pairs = recipe.data.sequence_length, recipe.train.objective == "mlm_nsp"
    require_length(recipe.model.family, length, recipe.origin("data.sequence_length"), pairs=pairs)
    corpus = prepare_tokens(recipe, show_progress)
    for split in SPLITS:
        RowIndex.open(corpus, split, length, recipe.data.packing, pairs=pairs)
    return corpus


def prepare_tokens(recipe: Recipe, show_progress: bool = True) -> Corpus:
    """Do the part of `prepare` that rows of all lengths have in common."""
    folder = corpus_folder(recipe)
    with locked(folder.with_suffix(".lock")):
        if not is_prepared(folder):
            if recipe.data.mixture is None:
                _build(recipe, folder, show_progress)
            else:
                build_mixture(recipe, folder, show_progress, prepare_tokens)
    return open_corpus(recipe)


def _build(recipe: Recipe, folder: Path, show_progress: bool) -> None:
    aside = folder.with_suffix(".partial")
    aside.mkdir(parents=True, exist_ok=True)
    for left in aside.glob("*.aside"):  # of a killed process
        left.unlink()
    if not (aside / MANIFEST).exists():
        try:
            with Progress("tokenizing", total_bytes(recipe.data), show_progress) as progress:
                _tokenize(recipe, aside, progress)
        except DataError:
            if not is_streamed(recipe.data):  # a stream that broke off goes on
                shutil.rmtree(aside)  # files that are mended have another fingerprint, so nobody would go on here
            raise
    forget(aside)
    aside.rename(folder)


def _tokenize(recipe: Recipe, aside: Path, progress: Progress) -> None:
    from bigtrain.data.toolkit import toolkit

    origin = recipe.origin("data.source")
    before = identity(recipe.data, origin)
    kit = toolkit(recipe, aside / TOKENIZER, progress)
    state = resumed(aside)
    if is_streamed(recipe.data) and recipe.data.max_tokens is None and (needed := needed_tokens(recipe)):
        progress.say(f"reading the whole stream; data.max_tokens={needed} stops where this run has read enough")
    _write_parts(recipe, aside, kit, state, progress)
    if identity(recipe.data, origin) != before:
        raise data_error(origin, "the files changed while they were read; run again")
    write_json(aside / MANIFEST, _manifest(recipe, aside, kit, state))
    held, tokens, _ = (sum(column) for column in zip(*total_counts(state["parts"]).values(), strict=True))
    took = format_seconds(progress.seconds)
    progress.say(f"tokenized {format_count(held)} documents into {format_count(tokens)} tokens in {took}")
    if any(state["left_out"].values()):
        progress.say(f"left out: {left_out_text(state['left_out'])}")


def needed_tokens(recipe: Recipe) -> int | None:
    """Return how many tokens give each row of a run once, those to evaluate on included; None for a run of epochs."""
    train, steps = recipe.train, recipe.train.steps
    tokens = train.tokens if steps is None else steps * train.global_batch_size * recipe.data.sequence_length
    return None if tokens is None else math.ceil(tokens / (1 - recipe.data.validation_fraction))


def _write_parts(recipe: Recipe, aside: Path, kit: Toolkit, state: State, progress: Progress) -> None:
    meter, part, pending = Meter(), None, list[Batch]()
    reading = Reading(recipe.data, recipe.origin("data.source"), meter, mark_of(state["mark"]))
    selection = Selection(recipe.data, seen_before(aside, state))
    read = ReadAhead(batches(reading, selection), 1)
    encoded = ReadAhead(_encoded(kit.tokenizer, read), 1)
    written, room = 0, _room(recipe.data, state)
    with closing(read), closing(encoded), ExitStack() as files:
        for batch, encodings in encoded:
            if room <= 0:
                break
            if part is None:
                part = PartWriter(aside, len(state["parts"]), kit.dtype, total_counts(state["parts"]))
                files.callback(part.release)
            kept = _documents_within(room, encodings, kit.frame)
            tokens = part.add(batch.texts[:kept], encodings[:kept], kit.frame, recipe.data.validation_fraction)
            written, room = written + tokens, room - tokens
            pending.append(batch._replace(texts=[]))
            progress.update(meter.read_bytes, written)
            if part.tokens >= SHARD_TOKENS or room <= 0:
                finish(part, pending, state, aside)
                part, pending = None, []
        if part is not None:
            finish(part, pending, state, aside)


def _room(data: DataSection, state: State) -> float:
    """Return how many tokens may be written yet."""
    written = sum(counts.tokens for counts in total_counts(state["parts"]).values())
    return math.inf if data.max_tokens is None else data.max_tokens - written


def _documents_within(room: float, encodings: Sequence[Encoding], frame: Frame) -> int:
    """Return how many documents to write until there is no more room: the last one may go beyond it."""
    framing = len(frame.before) + len(frame.after)
    lengths = np.array([len(encoding) + framing if len(encoding) else 0 for encoding in encodings], np.int64)
    return len(encodings) if lengths.sum() <= room else int(np.searchsorted(np.cumsum(lengths), room)) + 1


def _encoded(tokenizer: Tokenizer, batches: Iterable[Batch]) -> Iterator[tuple[Batch, list[Encoding]]]:
    from bigtrain.data.tokenizer import is_of_tokenizers, panics_unsaid

    tried = False
    for batch in batches:
        try:
            if batch.texts and not tried:  # one alone: where each fails after a while, all would take minutes
                with panics_unsaid():
                    tokenizer.encode(batch.texts[0], add_special_tokens=False)
                tried = True
            encodings = tokenizer.encode_batch_fast(batch.texts, add_special_tokens=False)
        except BaseException as error:
            if not is_of_tokenizers(error):
                raise
            reason = str(error).splitlines()[0]
            raise data_error("", f"it cannot encode these texts: {reason}; use another", TOKENIZER_KEY) from error
        yield batch, encodings


def _manifest(recipe: Recipe, aside: Path, kit: Toolkit, state: State) -> dict[str, Any]:
    totals = total_counts(state["parts"])
    if not all(totals[split].documents for split in SPLITS):
        text = "two documents are needed, one of them to evaluate on; in a .txt file a blank line ends a document"
        if any(state["left_out"].values()):
            text = f"two documents are needed, one of them to evaluate on; left out: {left_out_text(state['left_out'])}"
        raise data_error(recipe.origin("data.source"), text)
    files = files_of(state)
    _write_unigram_counts(aside, files, kit)
    for name in (TOKENIZER, UNIGRAM_COUNTS):
        files[name] = {"bytes": (aside / name).stat().st_size, "sha256": file_digest(aside / name)}
    return {
        "facts": corpus_facts(recipe),
        "family": recipe.model.family,
        "dtype": kit.dtype,
        "tokenizer": {"vocab_size": kit.vocab_size, "special_tokens": asdict(kit.special)},
        "splits": {split: counts._asdict() for split, counts in totals.items()},
        "files": files,
        "left_out": state["left_out"],
    }


def _write_unigram_counts(aside: Path, files: Iterable[str], kit: Toolkit) -> None:
    counts = np.zeros(kit.vocab_size, np.int64)
    for name in files:
        if name.startswith("train") and name.endswith(".tokens"):
            with (aside / name).open("rb") as file:
                while chunk := file.read(2**24):
                    counts += np.bincount(np.frombuffer(chunk, kit.dtype), minlength=kit.vocab_size)
    with written_aside(aside / UNIGRAM_COUNTS) as file:
        np.save(file, counts)
