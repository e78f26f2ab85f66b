"""Measure the data pipeline: tokenizing beside the tokenizers library alone, memory on a large file, loader speed.

    python scripts/bench_data.py --output benchmarks/data.json
    python scripts/bench_data.py --large --output benchmarks/data.json

Tokenizing: `prepare` from a text file to packed rows, and `Tokenizer.encode_batch` over the same documents held in
memory (1,000 a call), in alternating pairs; the ratio is the median of the pairs'. Loading: tokens for each second
that the process spent on a core. `--large` adds the resident peak of preparing a text file of 1 GB. The text is the
embedded one, its documents shuffled and repeated. Prints one JSON object; `--output` updates that file with it.
"""

from __future__ import annotations

import argparse
import json
import os
import pickle
import platform
import random
import statistics
import subprocess
import sys
import tempfile
import time
from collections.abc import Iterator
from importlib import metadata
from itertools import islice
from pathlib import Path
from typing import Any

from bigtrain.config.schema import DataSection, ModelSection, OptimizerSection, Recipe, TrainSection
from bigtrain.data.build import prepare
from bigtrain.data.corpus import SPLITS, Corpus
from bigtrain.data.embedded import embedded_documents
from bigtrain.data.loader import Loader
from bigtrain.data.packing import RowIndex
from bigtrain.data.sources import documents
from bigtrain.data.tokenizer import open_tokenizer, train_tokenizer

BATCH_DOCUMENTS = 1000
SEQUENCE_LENGTH = 512
LOADER_SECONDS = 3.0
LARGE_BYTES = 10**9

PEAK = """
import pathlib, pickle, sys
from bigtrain.data.build import prepare
prepare(pickle.loads(pathlib.Path(sys.argv[1]).read_bytes()), show_progress=False)
status = dict(line.split(":", 1) for line in pathlib.Path("/proc/self/status").read_text().splitlines())
print(int(status["VmHWM"].split()[0]) * 1024)
"""
"""The peak is asked of the process itself: what a parent is told of a child includes the parent before `exec`."""


def main() -> None:
    """Measure, and print the result."""
    parser = argparse.ArgumentParser(description=(__doc__ or "").partition("\n")[0])
    parser.add_argument("--megabytes", type=int, default=60, help="size of the text that is tokenized")
    parser.add_argument("--pairs", type=int, default=3, help="alternating pairs of runs")
    parser.add_argument("--vocab-size", type=int, default=8192)
    parser.add_argument("--large", action="store_true", help="measure memory on a text file of 1 GB instead")
    parser.add_argument("--output", type=Path)
    options = parser.parse_args()
    with tempfile.TemporaryDirectory() as name:
        folder = Path(name)
        result = large(folder, options.vocab_size) if options.large else rates(folder, options)
    result = {**_before(options.output), **result}
    text = json.dumps(result, indent=1)
    if options.output:
        options.output.write_text(text + "\n", encoding="utf-8")
    print(text)


def rates(folder: Path, options: argparse.Namespace) -> dict[str, Any]:
    """Return the rates of tokenizing and of loading."""
    source = write_text(folder / "text.txt", options.megabytes * 10**6)
    found: dict[str, Any] = {"tokenizing": {}, "loading": {}}
    for family in ("bert", "gpt"):
        recipe = make_recipe(family, source, folder, options.vocab_size)
        found["tokenizing"][family] = tokenizing(recipe, folder, options.pairs)
        corpus = prepare(recipe, show_progress=False)
        found["loading"][family] = loading(corpus)
    return {**found, "megabytes": options.megabytes, "vocab_size": options.vocab_size, "rates_made_by": _provenance()}


def tokenizing(recipe: Recipe, folder: Path, pairs: int) -> dict[str, Any]:
    """Return the tokens a second of both arms, pair by pair, and the median of their ratios."""
    texts = list(documents(recipe.data))
    ours, theirs = [], []
    for number in range(pairs):
        fresh = recipe.data.model_copy(update={"cache": str(folder / f"{recipe.model.family}-{number}")})
        begun = time.perf_counter()
        corpus = prepare(recipe.model_copy(update={"data": fresh}), show_progress=False)
        ours.append(sum(corpus.counts(split).tokens for split in SPLITS) / (time.perf_counter() - begun))
        theirs.append(encode_batch_rate(corpus.tokenizer_file, texts))
    ratios = [one / other for one, other in zip(ours, theirs, strict=True)]
    return {"tokens_per_second": ours, "encode_batch_tokens_per_second": theirs, "ratio": statistics.median(ratios)}


def encode_batch_rate(tokenizer_file: Path, texts: list[str]) -> float:
    """Return the tokens a second of the tokenizers library, the results of each call dropped."""
    tokenizer = open_tokenizer(tokenizer_file)
    begun, tokens = time.perf_counter(), 0
    for start in range(0, len(texts), BATCH_DOCUMENTS):
        tokens += sum(map(len, tokenizer.encode_batch(texts[start : start + BATCH_DOCUMENTS])))
    return tokens / (time.perf_counter() - begun)


def loading(corpus: Corpus) -> dict[str, Any]:
    """Return the tokens that a loader gives for each second on a core, and how full its rows are."""
    objective: Any = "mlm" if corpus.family == "bert" else "clm"
    loader = Loader(corpus, objective=objective, sequence_length=SEQUENCE_LENGTH, global_batch_size=64, seed=1)
    rate = core_rate(loader, LOADER_SECONDS)
    loader.close()
    fill = RowIndex.open(corpus, "train", SEQUENCE_LENGTH, True).fill
    return {"objective": objective, "tokens_per_core_second": rate, "fill": fill}


def core_rate(loader: Loader, seconds: float) -> float:
    """Return the tokens that a loader gives for each second on a core, of so many seconds."""
    batches = iter(loader)
    for _ in range(10):
        next(batches)
    begun, tokens = time.process_time(), 0
    while time.process_time() - begun < seconds:
        tokens += sum(int(batch["document_lengths"].sum()) for batch in islice(batches, 10))
    return tokens / (time.process_time() - begun)


def large(folder: Path, vocab_size: int) -> dict[str, Any]:
    """Return the resident peak of a process that prepares a text file of 1 GB."""
    source = write_text(folder / "text.txt", LARGE_BYTES)
    recipe = make_recipe("gpt", source, folder, vocab_size)
    (folder / "recipe").write_bytes(pickle.dumps(recipe))
    begun = time.perf_counter()
    command = [sys.executable, "-c", PEAK, str(folder / "recipe")]
    done = subprocess.run(command, capture_output=True, text=True, check=True)
    seconds = time.perf_counter() - begun
    measured = {"text_bytes": source.stat().st_size, "resident_bytes_peak": int(done.stdout), "seconds": seconds}
    return {"large": measured, "large_made_by": _provenance()}


def make_recipe(family: Any, source: Path, folder: Path, vocab_size: int) -> Recipe:
    """Return a recipe on this text, its tokenizer trained beforehand."""
    tokenizer = folder / f"{family}.json"
    train_tokenizer(_shuffled(), family, vocab_size, lowercase=False).save(str(tokenizer))
    return Recipe(
        name="bench",
        model=ModelSection(family=family, hidden_size=64, num_hidden_layers=1, num_attention_heads=1),
        data=DataSection(
            source=str(source), tokenizer=str(tokenizer), sequence_length=SEQUENCE_LENGTH, cache=str(folder / "cache")
        ),
        train=TrainSection(objective="mlm" if family == "bert" else "clm", steps=1),
        optimizer=OptimizerSection(learning_rate=1e-3),
    )


def write_text(path: Path, size: int) -> Path:
    """Write a text of about `size` bytes: the embedded documents in one shuffled order after another."""
    with path.open("wb") as file:
        for text in _shuffled():
            file.write(text.encode() + b"\n\n")
            if file.tell() >= size:
                break
    return path


def _shuffled() -> Iterator[str]:
    texts, order = list(embedded_documents()), random.Random(1)
    while True:
        order.shuffle(texts)
        yield from texts


def _provenance() -> dict[str, Any]:
    commit = subprocess.run(["git", "rev-parse", "HEAD"], capture_output=True, text=True, check=False).stdout.strip()
    return {
        "command": " ".join(["python", *sys.argv]),
        "commit": commit,
        "python": platform.python_version(),
        "versions": {name: metadata.version(name) for name in ("tokenizers", "numpy", "torch", "pyarrow")},
        "cores": len(os.sched_getaffinity(0)),
    }


def _before(output: Path | None) -> dict[str, Any]:
    if output is None or not output.exists():
        return {}
    known: dict[str, Any] = json.loads(output.read_text(encoding="utf-8"))
    return known


if __name__ == "__main__":
    main()
