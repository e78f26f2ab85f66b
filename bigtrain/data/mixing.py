"""A mixture: the corpora of several sources as one, by an index over them; each is tokenized once, on its own."""

from __future__ import annotations

import hashlib
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np

from bigtrain.config.schema import DataSection, Recipe
from bigtrain.data.cache import file_digest, write_json, written_aside
from bigtrain.data.corpus import (
    MANIFEST,
    SPLITS,
    TOKENIZER,
    UNIGRAM_COUNTS,
    Corpus,
    Source,
    Split,
    SplitCounts,
    corpus_facts,
)
from bigtrain.data.progress import Progress
from bigtrain.data.sources import members, told_of_mixture
from bigtrain.data.vocabulary import TRAIN

Prepare = Callable[[Recipe, bool], Corpus]


def build_mixture(recipe: Recipe, folder: Path, show_progress: bool, prepare_tokens: Prepare) -> None:
    """Write the corpus of a mixture, after `prepare_tokens` has made those of its sources with one tokenizer."""
    tokenizer = _shared_tokenizer(recipe, show_progress)
    sources = []
    for data, weight in members(recipe.data):
        alone = _alone(recipe, data.model_copy(update={"tokenizer": tokenizer}))
        with told_of_mixture():
            sources.append(Source(prepare_tokens(alone, show_progress), weight))
    aside = folder.with_suffix(".partial")
    shutil.rmtree(aside, ignore_errors=True)
    aside.mkdir(parents=True)
    write_json(aside / MANIFEST, _manifest(recipe, aside, sources))
    shutil.rmtree(folder, ignore_errors=True)  # one that has lost a source
    aside.rename(folder)


def _shared_tokenizer(recipe: Recipe, show_progress: bool) -> str:
    """Return what the recipe of each source names as its tokenizer: of one to train, the file."""
    if recipe.data.tokenizer != TRAIN:
        return recipe.data.tokenizer
    from bigtrain.data.toolkit import trained_tokenizer_file

    with Progress("reading", None, show_progress) as progress:
        return str(trained_tokenizer_file(_alone(recipe, recipe.data), progress))


def _alone(recipe: Recipe, data: DataSection) -> Recipe:
    """Return a recipe of these data, of which faults are told where the mixture is written.

    It learns no pairs: what they need is asked of the mixture, which can say whose documents are too few.
    """
    keys = ("", "data", "data.tokenizer", "data.vocab_size", "model.vocab_size", "train.objective")
    origins = {key: recipe.origin(key) for key in keys}
    origins["data.source"] = recipe.origin("data.mixture")
    objective = "mlm" if recipe.train.objective == "mlm_nsp" else recipe.train.objective
    train = recipe.train.model_copy(update={"objective": objective})
    return recipe.model_copy(update={"data": data, "train": train}).with_origins(origins)


def _manifest(recipe: Recipe, aside: Path, sources: list[Source]) -> dict[str, Any]:
    first = sources[0].corpus
    files: dict[str, Any] = {}
    for split in SPLITS:
        files |= _offsets(aside, split, sources)
    shutil.copyfile(first.tokenizer_file, aside / TOKENIZER)
    with written_aside(aside / UNIGRAM_COUNTS) as file:
        np.save(file, _unigram_counts(sources))
    for name in (TOKENIZER, UNIGRAM_COUNTS):
        files[name] = {"bytes": (aside / name).stat().st_size, "sha256": file_digest(aside / name)}
    counts = {split: [source.corpus.counts(split) for source in sources] for split in SPLITS}
    left_out = [source.corpus.left_out for source in sources]
    return {
        "facts": corpus_facts(recipe),
        "family": first.family,
        "dtype": first.manifest["dtype"],
        "tokenizer": first.manifest["tokenizer"],
        "splits": {split: SplitCounts(*map(sum, zip(*held, strict=True)))._asdict() for split, held in counts.items()},
        "files": files,
        "left_out": {why: sum(counts[why] for counts in left_out) for why in left_out[0]},
        "sources": [{"corpus": source.corpus.folder.name, "weight": source.weight} for source in sources],
    }


def _offsets(aside: Path, split: Split, sources: list[Source]) -> dict[str, dict[str, Any]]:
    """Write the documents' bounds, counted on from source to source; return the files' facts."""
    files = {}
    before = 0
    for number, source in enumerate(sources):
        for shard, held in enumerate(source.corpus.shards(split)):
            content = (held.offsets + np.uint64(before)).tobytes()
            name = f"{split}-{number:03d}-{shard:05d}.offsets"
            with written_aside(aside / name) as file:
                file.write(content)
            files[name] = {"bytes": len(content), "sha256": hashlib.sha256(content).hexdigest()}
        before += source.corpus.counts(split).tokens
    return files


def _unigram_counts(sources: list[Source]) -> Any:
    """Return how often each token would stand in as many tokens as there are, drawn by the sources' weights."""
    tokens = [source.corpus.counts("train").tokens for source in sources]
    total = sum(source.weight for source in sources)
    counts = np.zeros(sources[0].corpus.vocab_size)
    for source, held in zip(sources, tokens, strict=True):
        counts += source.corpus.unigram_counts * (source.weight / total * sum(tokens) / held)
    return np.rint(counts).astype(np.int64)
