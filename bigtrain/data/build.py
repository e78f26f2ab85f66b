"""Tokenize a source once: documents into shards, a part at a time, so that an interrupted run goes on where it was."""

from __future__ import annotations

import itertools
import shutil
from collections.abc import Iterable, Iterator
from contextlib import ExitStack, closing
from dataclasses import asdict
from pathlib import Path
from typing import TYPE_CHECKING, Any, TypeAlias

import numpy as np

from bigtrain import strict_json
from bigtrain.config.schema import Recipe
from bigtrain.data.background import ReadAhead
from bigtrain.data.cache import file_digest, locked, write_json, written_aside
from bigtrain.data.corpus import (
    LARGEST_MANIFEST_BYTES,
    MANIFEST,
    SPLITS,
    TOKENIZER,
    UNIGRAM_COUNTS,
    Corpus,
    are_files,
    corpus_facts,
    corpus_folder,
    is_prepared,
    open_corpus,
)
from bigtrain.data.decoding import Meter, data_error
from bigtrain.data.packing import RowIndex, require_length
from bigtrain.data.part import PartWriter, total_counts
from bigtrain.data.progress import Progress
from bigtrain.data.sources import documents, identity, total_bytes
from bigtrain.data.vocabulary import TOKENIZER_KEY
from bigtrain.errors import DataError
from bigtrain.units import format_count, format_seconds

if TYPE_CHECKING:
    from tokenizers import Encoding, Tokenizer

    from bigtrain.data.toolkit import Toolkit

SHARD_TOKENS = 2**26
"""A part ends with the batch that reaches this; it is the most that an interruption costs."""
BATCH_CHARACTERS = 2**20
"""Encoded at once: enough documents for every core, and no more than a hundred MB of encodings."""
BATCH_DOCUMENTS = 8192
STATE = "progress.json"

State: TypeAlias = dict[str, Any]
"""`parts`: the facts of each finished part; `consumed`: how many documents of the source they took."""


def prepare(recipe: Recipe, show_progress: bool = True) -> Corpus:
    """Tokenize a recipe's source in this process, unless that was done, and pack its rows; return the corpus.

    Waits for another process that prepares the same; goes on after the last finished shard of an interrupted one.
    Raises DataError for whatever is wrong with the source or the tokenizer.
    """
    require_length(recipe.model.family, recipe.data.sequence_length, recipe.origin("data.sequence_length"))
    folder = corpus_folder(recipe)
    with locked(folder.with_suffix(".lock")):
        if not is_prepared(folder):
            _build(recipe, folder, show_progress)
    corpus = open_corpus(recipe)
    for split in SPLITS:
        RowIndex.open(corpus, split, recipe.data.sequence_length, recipe.data.packing)
    return corpus


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
            shutil.rmtree(aside)  # files that are mended have another fingerprint, so nobody would go on here
            raise
    (aside / STATE).unlink(missing_ok=True)
    aside.rename(folder)


def _tokenize(recipe: Recipe, aside: Path, progress: Progress) -> None:
    from bigtrain.data.toolkit import toolkit

    origin = recipe.origin("data.source")
    before = identity(recipe.data, origin)
    kit = toolkit(recipe, aside / TOKENIZER, progress)
    state = _resumed(aside)
    _write_parts(recipe, aside, kit, state, progress)
    if identity(recipe.data, origin) != before:
        raise data_error(origin, "the files changed while they were read; run again")
    write_json(aside / MANIFEST, _manifest(recipe, aside, kit, state))
    held, tokens, _ = (sum(column) for column in zip(*total_counts(state["parts"]).values(), strict=True))
    took = format_seconds(progress.seconds)
    progress.say(f"tokenized {format_count(held)} documents into {format_count(tokens)} tokens in {took}")


def _resumed(aside: Path) -> State:
    """Return the state of an interrupted run; of a new one also where a finished part is damaged."""
    fresh: State = {"consumed": 0, "parts": []}
    if not (aside / STATE).exists():
        return fresh
    try:
        state: State = strict_json.read(aside / STATE, LARGEST_MANIFEST_BYTES)
        files = _files(state)
        whole = are_files(files) and type(state["consumed"]) is int and state["consumed"] >= 0
        total_counts(state["parts"])
        Corpus(aside, {"files": files}).verify()
    except (DataError, ValueError, KeyError, TypeError, AttributeError):
        return fresh
    return state if whole else fresh


def _write_parts(recipe: Recipe, aside: Path, kit: Toolkit, state: State, progress: Progress) -> None:
    meter, writer = Meter(), None
    stream = documents(recipe.data, recipe.origin("data.source"), meter)
    batches = ReadAhead(_batches(itertools.islice(stream, state["consumed"], None)), 1)
    encoded = ReadAhead(_encoded(kit.tokenizer, batches), 1)
    written = 0
    with closing(batches), closing(encoded), ExitStack() as files:
        for texts, encodings in encoded:
            if writer is None:
                writer = PartWriter(aside, len(state["parts"]), kit.dtype, total_counts(state["parts"]))
                files.callback(writer.release)
            written += writer.add(texts, encodings, kit.frame, recipe.data.validation_fraction)
            progress.update(meter.read_bytes, written)
            if writer.tokens >= SHARD_TOKENS:
                _finish(writer, state, aside)
                writer = None
        if writer is not None:
            _finish(writer, state, aside)


def _finish(writer: PartWriter, state: State, aside: Path) -> None:
    state["parts"].append(writer.close())
    state["consumed"] += writer.consumed
    write_json(aside / STATE, state)


def _batches(texts: Iterator[str]) -> Iterator[list[str]]:
    batch: list[str] = []
    characters = 0
    for text in texts:
        batch.append(text)
        characters += len(text)
        if characters >= BATCH_CHARACTERS or len(batch) == BATCH_DOCUMENTS:
            yield batch
            batch, characters = [], 0
    if batch:
        yield batch


def _encoded(tokenizer: Tokenizer, batches: Iterable[list[str]]) -> Iterator[tuple[list[str], list[Encoding]]]:
    from bigtrain.data.tokenizer import is_of_tokenizers, panics_unsaid

    tried = False
    for batch in batches:
        try:
            if not tried:  # one alone: where each fails after a while, all of a batch would take minutes
                with panics_unsaid():
                    tokenizer.encode(batch[0], add_special_tokens=False)
                tried = True
            encodings = tokenizer.encode_batch_fast(batch, add_special_tokens=False)
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
        raise data_error(recipe.origin("data.source"), text)
    files = _files(state)
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
    }


def _files(state: State) -> dict[str, Any]:
    return {name: facts for part in state["parts"] for name, facts in part["files"].items()}


def _write_unigram_counts(aside: Path, files: Iterable[str], kit: Toolkit) -> None:
    counts = np.zeros(kit.vocab_size, np.int64)
    for name in files:
        if name.startswith("train") and name.endswith(".tokens"):
            with (aside / name).open("rb") as file:
                while chunk := file.read(2**24):
                    counts += np.bincount(np.frombuffer(chunk, kit.dtype), minlength=kit.vocab_size)
    with written_aside(aside / UNIGRAM_COUNTS) as file:
        np.save(file, counts)
