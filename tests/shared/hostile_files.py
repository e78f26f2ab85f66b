"""Files that somebody made to do harm, by name: how each is made, and what of bigtrain reads it.

`Case.read` must raise an InputError of one line, or, where `passed_over` says so, return without the file's content.
`EVIL` is a pickle that would make the file `canary` in the current folder.
"""

from __future__ import annotations

import json
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import torch
from hostile_data import CANARY, DEEP, EVIL, RECIPE, Case, corpora, holes, put, sources, tokenizers

from bigtrain.checkpoint import manifest, tensors
from bigtrain.checkpoint.counts import read_counts
from bigtrain.checkpoint.resume import stored_recipe
from bigtrain.checkpoint.state import WEIGHTS
from bigtrain.checkpoint.store import CheckpointStore, find_checkpoint
from bigtrain.checkpoint.stored import StoredTensors
from bigtrain.config.load import load_recipe
from bigtrain.data.corpus import Corpus
from bigtrain.models.hf import from_hugging_face
from bigtrain.planner.rates import read_kept
from bigtrain.training.metrics import cut_after, read_metrics


def cases(source: Path, corpus: Corpus) -> dict[str, Case]:
    """Return all by name; `source` are sound data, `corpus` what they became."""
    return {
        **dict(_safetensors()),
        **dict(_checkpoints()),
        **dict(_states()),
        **dict(_recipes(source)),
        **dict(tokenizers(source)),
        **dict(corpora(source, corpus)),
        **dict(sources()),
        **dict(_configs()),
        **dict(_passed_over()),
    }


def _header(header: object, body: bytes = bytes(8), length: int | None = None) -> bytes:
    text = header if isinstance(header, bytes) else json.dumps(header).encode()
    return (len(text) if length is None else length).to_bytes(8, "little") + text + body


def _safetensors() -> Iterator[tuple[str, Case]]:
    def entry(shape: list[object], start: int = 0, end: int = 8, kind: str = "F32") -> dict[str, Any]:
        return {"dtype": kind, "shape": shape, "data_offsets": [start, end]}

    twice = b'{"t": {"dtype": "F32", "shape": [2], "data_offsets": [0, 8]}, "t": {"dtype": "F32", "shape": [2], '
    part = {"__metadata__": {"t": json.dumps([[2**62], [2**62], [2**62]])}, "t": entry([2])}
    found = {
        "a pickle": EVIL,
        "a pickle behind a length": _header(EVIL),
        "a length of 2**63": _header({}, length=2**63),
        "a length beyond the file": _header({}, length=2**40),
        "100 MB of spaces": _header(b" " * 100_000_000),
        "8 MB of brackets": _header(b'{"t":[' + b"[]," * 2_700_000 + b"[]]}"),
        "deep nesting": _header(b'{"t": ' + DEEP),
        "a shape of 2**62": _header({"t": entry([2**62, 4], 0, 0)}, b""),
        "a shape that wraps around to 8 bytes": _header({"t": entry([2**32, 2**32 + 1], 0, 8)}),
        "a negative shape": _header({"t": entry([-1, -2])}),
        "a shape of fractions": _header({"t": entry([2.0])}),
        "a shape of 1e999": _header(b'{"t": {"dtype": "F32", "shape": [1e999], "data_offsets": [0, 8]}}'),
        "negative offsets": _header({"t": entry([2], -8, 0)}),
        "offsets of 2**80": _header({"t": entry([2], 2**80, 2**80 + 8)}),
        "overlapping offsets": _header({"a": entry([2]), "b": entry([2])}),
        "offsets with a gap": _header({"a": entry([1], 4, 8)}),
        "a key twice": _header(twice + b'"data_offsets": [0, 8]}}'),
        "a part of 2**62 rows": _header(part),
        "an unknown dtype": _header({"t": entry([1], kind="O")}),
    }
    for name, content in found.items():
        yield f"safetensors: {name}", Case(put("x", content), lambda folder: list(tensors.read_tensors(folder / "x")))


def _checkpoints() -> Iterator[tuple[str, Case]]:
    def saved(folder: Path) -> Path:
        texts = {"plan.yaml": "name: x\n", "state.json": "{}"}
        return CheckpointStore(folder).save(3, {WEIGHTS: {"w": torch.ones(4)}}, texts)

    def names(step: Path, name: str, target: Path | None = None) -> None:
        content = json.loads((step / manifest.MANIFEST).read_bytes())
        content["files"][name] = content["files"].pop(WEIGHTS)
        (step / manifest.MANIFEST).write_bytes(manifest.encode({k: v for k, v in content.items() if k != "digest"}))

    def linked(folder: Path) -> None:
        file = saved(folder) / WEIGHTS
        file.rename(folder / "outside")
        file.symlink_to("../outside")

    def written(content: bytes) -> Callable[[Path], object]:
        return lambda folder: (saved(folder) / manifest.MANIFEST).write_bytes(content)

    def read(folder: Path) -> object:
        return list(StoredTensors(find_checkpoint(folder / "step-00000003"), WEIGHTS).whole())

    sealed = manifest.encode({"step": 3, "files": {"a": {"size": -1, "crc32": [], "sha256": {}}}})
    yield "checkpoint: a name with ../", Case(lambda folder: names(saved(folder), "../outside"), read)
    yield "checkpoint: an absolute name", Case(lambda folder: names(saved(folder), "/etc/passwd"), read)
    yield "checkpoint: a name with a zero byte", Case(lambda folder: names(saved(folder), "a\0b"), read)
    yield "checkpoint: a link to the outside", Case(linked, read)
    yield "manifest: a pickle", Case(written(EVIL), read)
    yield "manifest: deep nesting", Case(written(DEEP), read)
    yield "manifest: 1 GB", Case(lambda folder: holes(saved(folder) / manifest.MANIFEST, 2**30), read)
    yield "manifest: 4 MB of brackets", Case(written(b"[" + b"[]," * 1_390_000 + b"[]]"), read)
    yield "manifest: a number of 5,000 digits", Case(written(b'{"step": ' + b"9" * 5000 + b"}"), read)
    yield "manifest: sealed, of wrong types", Case(written(sealed), read)


def _states() -> Iterator[tuple[str, Case]]:
    found = {
        "a pickle": EVIL,
        "deep nesting": DEEP,
        "NaN for a step": b'{"step": NaN}',
        "a step of 1e999": b'{"step": 1e999}',
        "another form": b'{"step": 1, "tokens": 1, "loader": 7}',
    }
    for name, content in found.items():
        yield f"state.json: {name}", Case(put("x", content), lambda folder: read_counts(folder / "x"))


def _recipes(source: Path) -> Iterator[tuple[str, Case]]:
    sound = RECIPE.replace("SOURCE", str(source))
    laughs = "".join(f"k{n}: &a{n} [{', '.join([f'*a{n - 1}'] * 9)}]\n" for n in range(1, 12))
    found = {
        "a pickle": EVIL.decode(),
        "a tag of Python": f"name: !!python/object/apply:os.system ['touch {CANARY}']\n{sound}",
        "a tag with a module": f"name: !!python/name:os.system ''\n{sound}",
        "an alias bomb": "k0: &a0 [1]\n" + laughs * 20,
        "a merge key": sound.replace("optimizer: {", "optimizer: {<<: {name: adamw}, "),
        "deep nesting": f"name: {'[' * 100_000}",
        "a line of 250,000 characters": f"# {'x' * 250_000}\nname: [{sound}",
        "100,000 values": f"name: [{'1,' * 100_000}1]\n{sound}",
        "20,000 keys": "".join(f"k{n}: 1\n" for n in range(20_000)),
        "a number of 1e999": sound.replace("1e-3", "1e999"),
        "a number that is none": sound.replace("1e-3", ".nan"),
        "zero bytes": "name: \0\0\0\n",
    }
    for name, text in found.items():
        yield f"recipe: {name}", Case(put("x.yaml", text.encode()), lambda folder: load_recipe(folder / "x.yaml"))
    tagged = found["a tag of Python"].encode()
    yield "plan.yaml: a tag of Python", Case(put("plan.yaml", tagged), stored_recipe)
    yield "plan.yaml: 1 GB", Case(lambda folder: holes(folder / "plan.yaml", 2**30), stored_recipe)
    yield "plan.yaml: a folder", Case(lambda folder: (folder / "plan.yaml").mkdir(), stored_recipe)


def _configs() -> Iterator[tuple[str, Case]]:
    sound = {
        "architectures": ["BertForMaskedLM"],
        **dict.fromkeys(("vocab_size", "hidden_size", "num_hidden_layers", "num_attention_heads"), 4),
        **dict.fromkeys(("intermediate_size", "max_position_embeddings"), 4),
    }
    found: dict[str, dict[str, object]] = {
        "code of its own": {"auto_map": {"AutoModel": "modeling_evil.Evil"}},
        "architectures that are an object": {"architectures": [{"a": 1}]},
        "a width of 2**62": {"hidden_size": 2**62},
        "a norm_eps that is a list": {"layer_norm_eps": [1]},
    }
    for name, change in found.items():
        content = json.dumps({**sound, **change}).encode()
        yield (
            f"config.json: {name}",
            Case(
                put("config.json", content),
                lambda f: from_hugging_face(json.loads((f / "config.json").read_bytes()), {}),
            ),
        )


def _passed_over() -> Iterator[tuple[str, Case]]:
    def cut(folder: Path) -> None:
        cut_after(folder / "metrics.jsonl", 100)
        assert [row["step"] for row in read_metrics(folder)] == [1]
        assert (folder / "metrics.jsonl").read_bytes() == b'{"step": 1}\n'

    def unknown(folder: Path) -> None:
        assert read_kept(folder / "rates.json") == {}

    row = b'{"step": 1}\n'
    rates = {
        "of an infinite speed": '{"cpu": {"product_flops_per_second": 1e999}}',
        "deep": "[" * 200_000,
        "no JSON": "x",
    }
    for name, text in rates.items():
        yield f"rates.json: {name}", Case(put("rates.json", text.encode()), unknown, True)
    rows = {
        "a text": b'"step"\n',
        "a step of text": b'{"step": "a"}\n',
        "deep nesting": DEEP + b"\n",
        "zero bytes": bytes(99),
    }
    rows |= {
        "a line of 64 MB": b'{"step": 2, "a": "' + b"x" * 64_000_000 + b'"}\n',
        "a list": b'{"step": 2, "loss": []}\n',
    }
    for name, line in rows.items():
        yield f"metrics.jsonl: {name}", Case(put("metrics.jsonl", row + line + row), cut, True)
