"""Tokenize a source once: documents into shards, a part at a time, so that an interrupted run goes on where it was."""

from __future__ import annotations

import itertools
import json
import os
import shutil
from collections.abc import Iterator
from contextlib import closing
from dataclasses import asdict
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np

from bigtrain.config.schema import Recipe
from bigtrain.data.background import ReadAhead
from bigtrain.data.cache import cache_folder, file_digest, fingerprint, locked, write_json, written_aside
from bigtrain.data.corpus import (
    FORMAT_VERSION,
    MANIFEST,
    SPLITS,
    TOKENIZER,
    UNIGRAM_COUNTS,
    Corpus,
    check_tokenizer,
    corpus_facts,
    corpus_folder,
    is_prepared,
    open_corpus,
    tokenizer_facts,
)
from bigtrain.data.decoding import Meter, data_error
from bigtrain.data.packing import RowIndex
from bigtrain.data.part import PartWriter, frame_of, split_of
from bigtrain.data.progress import Progress
from bigtrain.data.shards import Tokens
from bigtrain.data.sources import documents, identity, sample, total_bytes
from bigtrain.data.vocabulary import TRAIN
from bigtrain.errors import DataError
from bigtrain.units import format_count, format_seconds

if TYPE_CHECKING:
    from tokenizers import Encoding, Tokenizer

SHARD_TOKENS = 2**26
"""A part ends with the batch that reaches this; it is the most that an interruption costs."""
BATCH_CHARACTERS = 2**20
"""Encoded at once: enough documents for every core, few enough for a hundred MB of encodings."""
BATCH_DOCUMENTS = 8192
STATE = "progress.json"


def prepare(recipe: Recipe, show_progress: bool = True) -> Corpus:
    """Tokenize a recipe's source in this process, unless that was done, and pack its rows; return the corpus.

    Waits for another process that prepares the same; goes on after the last finished shard of an interrupted one.
    Raises DataError for whatever is wrong with the source or the tokenizer.
    """
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
    origin = recipe.origin("data.source")
    before = identity(recipe.data, origin)
    with Progress("tokenizing", total_bytes(recipe.data), show_progress) as progress:
        kit = _toolkit(recipe, aside / TOKENIZER, progress)
        state = _resumed(aside)
        _write_parts(recipe, aside, kit, state, progress)
        if identity(recipe.data, origin) != before:
            shutil.rmtree(aside)
            raise data_error(origin, "the files changed while they were read; run again")
        manifest = _manifest(recipe, aside, kit, state)
        (aside / STATE).unlink()
        write_json(aside / MANIFEST, manifest)
        aside.rename(folder)
        progress.say(_summary(total_counts(state["parts"]).values(), progress.seconds, folder))


def _summary(counts: Iterable[SplitCounts], seconds: float, folder: Path) -> str:
    documents, tokens, _ = (sum(column) for column in zip(*counts, strict=True))
    held = f"{format_count(documents)} documents, {format_count(tokens)} tokens"
    return f"tokenized {held} in {format_seconds(seconds)}: {folder}"


def _tokenizer(recipe: Recipe, kept: Path, progress: Progress) -> Tokenizer:
    """Return the tokenizer, its file put where the corpus will have it."""
    from bigtrain.data.tokenizer import id_count, load_tokenizer, open_tokenizer, special_tokens

    if not kept.exists():
        if recipe.data.tokenizer == TRAIN:
            shutil.copyfile(_trained(recipe, progress), kept)
        else:
            tokenizer = load_tokenizer(recipe.data.tokenizer, recipe.origin("data.tokenizer"))
            check_tokenizer(recipe, special_tokens(tokenizer), id_count(tokenizer))
            with written_aside(kept) as file:
                file.write(tokenizer.to_str().encode())
    tokenizer = open_tokenizer(kept)
    check_tokenizer(recipe, special_tokens(tokenizer), id_count(tokenizer))
    return tokenizer


def _trained(recipe: Recipe, progress: Progress) -> Path:
    from bigtrain.data.tokenizer import sample_characters, train_tokenizer

    data = recipe.data
    facts = {"source": identity(data), "tokenizer": tokenizer_facts(recipe), "format": FORMAT_VERSION}
    path = cache_folder(data) / "tokenizers" / fingerprint(facts) / TOKENIZER
    with locked(path.parent.with_suffix(".lock")):
        if not path.exists():
            progress.say(f"training a tokenizer of {data.vocab_size} tokens")
            texts = sample(data, recipe.origin("data.source"), sample_characters(data.vocab_size))
            origin = recipe.origin("data.vocab_size")
            tokenizer = train_tokenizer(texts, recipe.model.family, data.vocab_size, data.lowercase, origin)
            with written_aside(path) as file:
                file.write(tokenizer.to_str().encode())
    return path


def _resumed(aside: Path) -> dict[str, Any]:
    """Return the state of an interrupted run, or of a new one; finished parts that are damaged are made again."""
    fresh: dict[str, Any] = {"consumed": 0, "parts": []}
    if not (aside / STATE).exists():
        return fresh
    state: dict[str, Any] = json.loads((aside / STATE).read_bytes())
    files = {name: facts for part in state["parts"] for name, facts in part["files"].items()}
    try:
        Corpus(aside, {"files": files}).verify()
    except DataError:
        return fresh
    return state


def _write_parts(recipe: Recipe, aside: Path, tokenizer: Tokenizer, state: dict[str, Any], progress: Progress) -> None:
    meter = Meter()
    stream = documents(recipe.data, recipe.origin("data.source"), meter)
    batches = ReadAhead(_batches(itertools.islice(stream, state["consumed"], None)), 1)
    encoded = ReadAhead(_encoded(tokenizer, batches), 1)
    writer = None
    with closing(batches), closing(encoded):
        for texts, encodings in encoded:
            writer = writer or PartWriter(aside, len(state["parts"]), _dtype(tokenizer), total_counts(state["parts"]))
            writer.add(texts, encodings, _frame(recipe, tokenizer), recipe.data.validation_fraction)
            progress.update(meter.read_bytes, writer.tokens)
            if writer.tokens >= SHARD_TOKENS:
                _finish(writer, state, aside)
                writer = None
    if writer is not None:
        _finish(writer, state, aside)


def _finish(writer: PartWriter, state: dict[str, Any], aside: Path) -> None:
    state["parts"].append(writer.close())
    state["consumed"] += writer.consumed
    write_json(aside / STATE, state)


def _manifest(recipe: Recipe, aside: Path, state: dict[str, Any], tokenizer: Tokenizer) -> dict[str, Any]:
    from bigtrain.data.tokenizer import id_count, special_tokens

    totals = total_counts(state["parts"])
    if not all(totals[split].documents for split in SPLITS):
        text = "two documents are needed, one of them to evaluate on; in a .txt file a blank line ends a document"
        raise data_error(recipe.origin("data.source"), text)
    files = {name: facts for part in state["parts"] for name, facts in part["files"].items()}
    _write_unigram_counts(aside, files, _dtype(tokenizer), id_count(tokenizer))
    for name in (TOKENIZER, UNIGRAM_COUNTS):
        files[name] = {"bytes": (aside / name).stat().st_size, "sha256": file_digest(aside / name)}
    return {
        "facts": corpus_facts(recipe),
        "family": recipe.model.family,
        "dtype": _dtype(tokenizer),
        "tokenizer": {"vocab_size": id_count(tokenizer), "special_tokens": asdict(special_tokens(tokenizer))},
        "splits": {split: counts._asdict() for split, counts in totals.items()},
        "files": files,
    }


def _write_unigram_counts(aside: Path, files: Iterable[str], dtype: str, vocab_size: int) -> None:
    counts = np.zeros(vocab_size, np.int64)
    for name in files:
        if name.startswith("train") and name.endswith(".tokens"):
            with (aside / name).open("rb") as file:
                while chunk := file.read(2**24):
                    counts += np.bincount(np.frombuffer(chunk, dtype), minlength=vocab_size)
    with written_aside(aside / UNIGRAM_COUNTS) as file:
        np.save(file, counts)


def _dtype(tokenizer: Tokenizer) -> str:
    from bigtrain.data.tokenizer import id_count

    return "uint16" if id_count(tokenizer) <= 2**16 else "uint32"


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


def _encoded(tokenizer: Tokenizer, batches: ReadAhead[list[str]]) -> Iterator[tuple[list[str], list[Encoding]]]:
    for batch in batches:
        yield batch, tokenizer.encode_batch_fast(batch, add_special_tokens=False)
