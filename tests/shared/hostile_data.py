"""Hostile files among the data: sources, tokenizers, tokenized corpora; and what every hostile file is."""

from __future__ import annotations

import gzip
import json
import shutil
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
import pyarrow as pa
import pyarrow.parquet

from bigtrain.config.load import load_recipe
from bigtrain.data.build import prepare
from bigtrain.data.corpus import Corpus, open_corpus
from bigtrain.data.decoding import Meter
from bigtrain.data.readers import read_documents
from bigtrain.data.rows import RowReader, RowShape
from bigtrain.data.tokenizer import load_tokenizer
from bigtrain.data.vocabulary import vocabulary_size

CANARY = "canary"
EVIL = b"cos\nsystem\n(S'touch canary'\ntR."
DEEP = b"[" * 200_000
RECIPE = """model: {family: bert, preset: bert-base, num_hidden_layers: 2}
data: {source: SOURCE, vocab_size: 120, sequence_length: 32, validation_fraction: 0.1}
train: {objective: mlm, global_batch_size: 8, steps: 10, device: cpu}
optimizer: {learning_rate: 1e-3, warmup_steps: 0}
"""


class Case(NamedTuple):
    """A hostile file: what makes it in an empty folder, and what reads it there."""

    make: Callable[[Path], object]
    read: Callable[[Path], object]
    passed_over: bool = False


def put(name: str, content: bytes) -> Callable[[Path], object]:
    return lambda folder: (folder / name).write_bytes(content)


def holes(path: Path, size: int) -> None:
    with path.open("wb") as file:
        file.truncate(size)


def tokenizers(source: Path) -> Iterator[tuple[str, Case]]:
    def of(**changes: object) -> bytes:
        model = {"type": "WordLevel", "vocab": {"[UNK]": 0, "a": 1}, "unk_token": "[UNK]"}
        parts = dict.fromkeys(("truncation", "padding", "normalizer", "pre_tokenizer", "post_processor", "decoder"))
        return json.dumps({"version": "1.0", **parts, "added_tokens": [], "model": model, **changes}).encode()

    def split(pattern: str) -> dict[str, Any]:
        return {"type": "Split", "pattern": {"Regex": pattern}, "behavior": "Isolated", "invert": False}

    def bpe(**vocabulary: int) -> dict[str, Any]:
        return {"type": "BPE", "vocab": vocabulary, "merges": [["a", "a"]]}

    found = {
        "a pickle": EVIL,
        "deep nesting": b'{"model": ' + DEEP,
        "a pattern that backtracks without end": of(pre_tokenizer=split("(a+)+$")),
        "a pattern that is none": of(pre_tokenizer=split("(((")),
        "a token id of 2**32 - 1": of(model=bpe(a=2**32 - 1)),
        "an id of 2**31 in a sound model": of(model={"type": "WordLevel", "vocab": {"a": 2**31}, "unk_token": "a"}),
        "a merge of what is not there": of(model=bpe(a=5)),
        "a map of characters that is damaged": of(normalizer={"type": "Precompiled", "precompiled_charsmap": "////"}),
        "1,300,000 empty lists": b'{"model": {"vocab": [' + b"[]," * 1_300_000 + b"[]]}}",
    }
    for name, content in found.items():
        reads = load_tokenizer if "ids" not in name else vocabulary_size
        yield f"tokenizer: {name}", Case(put("t.json", content), lambda folder, of=reads: of(str(folder / "t.json")))
    yield (
        "tokenizer: 1 GB",
        Case(lambda folder: holes(folder / "t.json", 2**30), lambda f: load_tokenizer(f"{f}/t.json")),
    )
    words = {"type": "WordLevel", "vocab": {"[CLS]": 0, "[SEP]": 1, "[MASK]": 2, "[UNK]": 3}, "unk_token": "[UNK]"}
    late = of(pre_tokenizer=split("([a-z ]+)+!"), model=words)

    def encode(folder: Path) -> object:
        (folder / "r.yaml").write_text(RECIPE.replace("SOURCE", str(source)))
        changes = [f"data.tokenizer={folder / 't.json'}", f"data.cache={folder}"]
        return prepare(load_recipe(folder / "r.yaml", changes), show_progress=False)

    yield "tokenizer: a pattern that backtracks without end in these data", Case(put("t.json", late), encode)


def corpora(source: Path, corpus: Corpus) -> Iterator[tuple[str, Case]]:
    def read(folder: Path) -> object:
        (folder / "r.yaml").write_text(RECIPE.replace("SOURCE", str(source)))
        found = open_corpus(load_recipe(folder / "r.yaml", [f"data.cache={folder}"]))
        reader = RowReader(found, "train", RowShape("mlm", 32, True), 1)
        assert found.unigram_counts.sum()
        return [reader.read(np.array([row]), np.zeros(1, np.int64)) for row in range(len(reader))]

    def damaged(change: Callable[[Path], object]) -> Case:
        def make(folder: Path) -> None:
            own = folder / "corpora" / corpus.folder.name
            shutil.copytree(corpus.folder, own)
            change(own)

        return Case(make, read)

    def manifest_with(**changes: object) -> Case:
        def change(own: Path) -> None:
            content = json.loads((own / "manifest.json").read_bytes())
            (own / "manifest.json").write_text(json.dumps({**content, **changes}))

        return damaged(change)

    def array(part: str, values: Any) -> Case:
        return damaged(lambda own: np.save(next(own.glob("rows/train*/")) / f"{part}.npy", values))

    def filled(pattern: str, content: bytes) -> Case:
        def change(own: Path) -> None:
            path = next(path for path in own.glob(pattern) if path.is_file())
            path.write_bytes((content * (path.stat().st_size // len(content) + 1))[: path.stat().st_size])

        return damaged(change)

    objects, shape = np.array([{"a": 1}], dtype=object), b"{'descr': '<i8', 'fortran_order': False, 'shape': (2**62,)}"
    files = {"../../../../etc/passwd": {"bytes": 1, "sha256": ""}}
    yield "corpus: a manifest that is a pickle", damaged(lambda own: (own / "manifest.json").write_bytes(EVIL))
    yield "corpus: a manifest of deep nesting", damaged(lambda own: (own / "manifest.json").write_bytes(DEEP))
    yield "corpus: names with ../", manifest_with(files=files)
    yield "corpus: a dtype of objects", manifest_with(dtype="O")
    yield "corpus: 2**40 tokens in the vocabulary", manifest_with(tokenizer={"vocab_size": 2**40, "special_tokens": {}})
    yield "corpus: counts of another form", manifest_with(splits=[1e300])
    yield "corpus: token ids beyond the vocabulary", filled("train*.tokens", b"\xff")
    yield "corpus: bounds of documents beyond the tokens", filled("train*.offsets", b"\xff\xff\xff\xff\xff\xff\xff\x00")
    yield "corpus: token frequencies that are a pickle", filled("unigram_counts.npy", EVIL)
    yield "rows: an array of pickled objects", array("starts", objects)
    yield "rows: starts of 2**62", array("starts", np.full(10**4, 2**62))
    yield "rows: offsets of 2**62", array("offsets", np.array([0, 2**62]))
    yield "rows: negative lengths", array("lengths", np.full(10**4, -5, np.int32))
    yield "rows: a shape of 2**62", filled("rows/train*/starts.npy", b"\x93NUMPY\x01\x00\x76\x00" + shape.ljust(118))


def sources() -> Iterator[tuple[str, Case]]:
    def read(folder: Path) -> object:
        file = next(path for path in folder.iterdir() if path.name.startswith("x."))
        return sum(len(text) for text in read_documents(file, "text", Meter()))

    def packed(content: bytes, times: int) -> Callable[[str], Callable[[Path], object]]:
        def make_at(name: str) -> Callable[[Path], object]:
            def make(folder: Path) -> None:
                with gzip.open(folder / name, "wb", compresslevel=1) as file:
                    for _ in range(times):
                        file.write(content)

            return make

        return make_at

    def table(folder: Path) -> None:
        pa.parquet.write_table(pa.table({"text": ["a"]}), folder / "x.parquet")
        content = (folder / "x.parquet").read_bytes()
        (folder / "x.parquet").write_bytes(content[:4] + b"\xff" * (len(content) - 12) + content[-8:])

    def extended(folder: Path) -> None:
        kind = {b"ARROW:extension:name": b"arrow.py_extension_type", b"ARROW:extension:metadata": EVIL}
        schema = pa.schema([pa.field("text", pa.binary(), metadata=kind)])
        with pa.OSFile(str(folder / "x.arrow"), "wb") as file, pa.ipc.new_stream(file, schema) as stream:
            stream.write_table(pa.table({"text": pa.array([b"a"])}, schema=schema))

    mebibyte = b"x" * 2**20
    found = {
        "x.parquet": EVIL * 10,
        "x.arrow": EVIL,
        "x.json": b'{"text": ' + DEEP,
        "x.jsonl": b'{"text": ' + DEEP,
        "x.csv": b'text\n"' + b"a,\n" * 10_000_000,
        "x.txt.gz": EVIL,
        "x.txt.zst": EVIL,
    }
    for name, content in found.items():
        yield f"data: {name} that is damaged", Case(put(name, content), read)
    yield "data: .jsonl with 5 million lists", Case(put("x.jsonl", b"[" + b"[]," * 5_000_000 + b"[]]"), read)
    yield "data: .json with 5 million lists", Case(put("x.json", b"[[" + b"[]," * 5_000_000 + b"[]]]"), read)
    yield "data: .jsonl.gz of one line of 1 GB", Case(packed(mebibyte, 64)("x.jsonl.gz"), read)
    yield "data: .json.gz of one text of 1 GB", Case(packed(b'{"text": "' + mebibyte, 64)("x.json.gz"), read)
    yield "data: .csv.gz of one line of 1 GB", Case(packed(mebibyte, 64)("x.csv.gz"), read)
    yield "data: .parquet.gz that fills the disk", Case(packed(bytes(2**20), 256)("x.parquet.gz"), read)
    yield "data: a Parquet file with a damaged footer", Case(table, read)
    yield "data: an Arrow file with a pickled type", Case(extended, read)
