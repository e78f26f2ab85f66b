"""Bad input, and what is said of it: overrides, recipe files, commands, data files."""

# ruff: noqa: E501  - lines that users read are tested as they are

from __future__ import annotations

import gzip
import json
import os

from bigtrain.config.shipped import recipe_path

OVERRIDES = {
    "key": "key: an override is written key=value",
    "=x": "an override is written key=value",
    "a.b.c=1": "unknown key; a recipe has name, seed, model",
    "train.=3": "unknown key; train has objective",
    "trainsteps=3": "did you mean 'train.steps'?",
    "train..steps=3": "did you mean 'train.steps'?",
    "train.seed=3": "did you mean 'seed'?",
    "train.steps=1e3": "1000.0 is not a whole number; write 1000",
    "train.steps=1e30": "1e+30 is too large; at most 9223372036854775807",
    "train.steps=nan": "'nan' is not a whole number of 1 or more",
    "train.steps=0": "0 is not a whole number of 1 or more",
    "train.steps=-1": "-1 is not a whole number of 1 or more",
    "train.steps=": "the length of the run is one of steps, tokens or epochs",
    "train.steps=٣": "'٣' is not a whole number of 1 or more",
    "train.steps=1\x00": "cannot be used; leave it out",
    "train.steps=\t3": "a tab cannot indent; use spaces",
    "train.steps=*a": "aliases (*a) are not understood; write the value itself",
    "train.steps=!!python/object/apply:os.system [id]": "tags (!!python/object/apply:os.system) are not understood",
    "seed=-1": "-1 is not a whole number of 0 or more",
    "seed=1e400": "inf is not a whole number of 0 or more",
    "seed=9223372036854775808": "is too large; at most 9223372036854775807",
    "name=../x": "is not a name of letters",
    "memory.budget=-1GiB": "or bytes with a unit, such as 16GiB",
    "memory.budget=0GiB": "or bytes with a unit, such as 16GiB",
    "memory.budget=24": "write for example '24GiB'",
    "memory.budget=1e400GiB": "or bytes with a unit, such as 16GiB",
    "model.num_hidden_layers=0": "0 is not a whole number of 1 or more",
    "model.num_hidden_layers=1000000000": "too large to plan; at most 1,000",
    "model.hidden_size=-1": "-1 is not a whole number of 1 or more",
    "model.num_attention_heads=5": "nearest that do: 4, 8",
    "model.preset=bert-lrge": "did you mean 'bert-large'?",
    "data.sequence_length=0": "0 is not a whole number of 1 or more",
    "data.vocab_size=-5": "-5 is not a whole number of 1 or more",
    "data.source=no/such.txt": "no such file or folder: 'no/such.txt'; name a folder, a file, a hub id or 'embedded'",
    "data.source=[embedded, embedded]": "'embedded' stands alone, not in a list",
    "data.mixture=[{source: embedded, weight: 0}]": "the weights sum to 0; give at least one source a weight above 0",
    "data.mixture=[{source: embedded, weight: -1}]": "source 1: weight -1 is not a number of 0 or more",
    "data.mixture=[{source: no/such.txt, weight: 1}]": "no such file or folder: 'no/such.txt'; name a folder, a file",
    "data.max_characters=3000000": "documents are cut at 1,048,576 characters before; use at most so many",
    "data.tokenizer=./none.json": "name a tokenizer.json or write 'train'",
    "data.cache=/dev/null": "cannot be written (Not a directory); name another folder, or set BIGTRAIN_CACHE",
    "train.global_batch_size=9223372036854775807": "too large to plan; at most 4,294,967,296",
    "train.micro_batch_size=3": "or micro_batch_size 2, 4",
    "train.masking_probability=1": "is not a number above 0 and below 1",
    "train.epochs=1e400": "inf is not a number above 0",
    "train.init_from=none": "give a run folder, or a step-NNNNNNNN folder in one",
    "train.objective=clm": "does not fit the family 'bert'",
    "optimizer.warmup_steps=100000": "100000 steps of warm-up are longer than the run of 1300; write a share such as 6%",
    "optimizer.warmup_steps=101%": "write for example 6%",
    "optimizer.warmup_steps=-5%": "write for example 6%",
    "amp.precision=fp16": "fp16 does not run on the CPU; it can fp32 and bf16",
    "amp.precision=fp8": "fp8 does not run on the CPU; it can fp32 and bf16",
    "cluster.devices_per_node=3": "nearest that are: 6, 9; or 1, 2, 4 or 8 ranks",
    "cluster.nodes=4:2": "write '2:4'",
    "cluster.nodes='0:2'": "or least:most, such as 2:4",
    "cluster.nodes=2": "write the name of one and a free port, such as node1:29400",
    "cluster.nodes=1:9999999": "too large to plan; at most 65,536",
    "cluster.timeout=60": "write for example '60s'",
    "cluster.timeout=0s": "a time with a unit, such as 60s",
    "checkpoint.keep=1": "1 is not a whole number of 2 or more",
    "sharding.zero_stage=4": "4 is not 'auto', 0, 1, 2 or 3",
    "recompute.policy=[none]": "a list of 1 for 2 blocks; write one entry a block",
}

BOMB = "a: &a [x, x, x]\n" + "".join(
    f"{b}: &{b} [*{a}, *{a}, *{a}]\n" for a, b in zip("abcdefgh", "bcdefghi", strict=True)
)
GOOD = recipe_path("quickstart_bert").read_text()

RECIPES = {
    "empty": ("", ": the file is empty"),
    "comments alone": ("# a\n# b\n", ": the file is empty"),
    "a list": ("- a\n", ": a recipe is a mapping of sections such as 'model:'"),
    "a word": ("hello", ": a recipe is a mapping of sections such as 'model:'"),
    "large": ("# " + "x" * 2_000_000, ": larger than 256 KiB; this is not a recipe"),
    "not UTF-8": ("name: é".encode("latin-1"), ": not UTF-8 at byte 6 (0xe9); save the file as UTF-8"),
    "UTF-16": ("name: x".encode("utf-16"), "save the file as UTF-8"),
    "binary": (bytes(range(256)), "save the file as UTF-8"),
    "a tab": ("model:\n\tfamily: bert\n", ":2: a tab cannot indent; use spaces"),
    "an alias bomb": (BOMB, ":1: a: anchors (&a) are not understood; write the value itself"),
    "an alias bomb behind": (GOOD + BOMB, "a: anchors (&a) are not understood; write the value itself"),
    "a tag": (
        f"{GOOD}x: !!python/object/apply:os.system [id]\n",
        "tags (!!python/object/apply:os.system) are not understood",
    ),
    "twice": (f"{GOOD}name: b\n", ": name: given twice, first in line 10; keep one"),
    "deep": ("a: " + "[" * 5000, ":1: a: nested more than 32 levels deep"),
    "indent": ("model:\n  family: bert\n   preset: x\n", "a wrong indent"),
    "outdent": (
        "model:\n  family: bert\n preset: x\n",
        ":3: broken YAML: indented unlike the lines above; give keys",
    ),
    "not closed": (
        "model: {family: bert\ntrain: {}\n",
        ":1: broken YAML: a bracket or quote that is not closed; close it",
    ),
    "two documents": ("a: 1\n---\nb: 2\n", ""),
    "no key": (f"{GOOD}: 1\n", "a key must be a word; write one before the ':'"),
    "an unprintable key": (f"{GOOD}na\u202eme: 1\n", r"'na\u202eme': unknown key; a recipe has name, seed"),
    "many keys": ("".join(f"k{n}: 1\n" for n in range(5000)), "this is not a recipe"),
}

COMMANDS: dict[tuple[str, ...], str] = {
    ("launch", "."): "is a folder; name a recipe file in it",
    ("launch", "none.yaml"): "no such file; the shipped recipes are bert_base",
    ("launch", "quickstart_brt"): "did you mean 'quickstart_bert'?",
    ("launch", "x" * 5000): "cannot be read: File name too long",
    ("launch", "quickstart_bert", "--run-dir", ""): "'--run-dir': it is empty; name a folder",
    ("launch", "quickstart_bert", "--run-dir", "x" * 300): "File name too long; name another folder",
    ("launch", "quickstart_bert", "--run-dir", "/dev/null"): "/dev/null is a file; name another folder",
    ("launch", "quickstart_bert", "--run-dir", "/dev/null/x"): "name another folder",
    ("launch", "quickstart_bert", "--run-dir", "/proc/x"): "No such file or directory; name another folder",
    ("launch", "quickstart_bert", "--json"): "No such option: --json",
    ("launch", "quickstart_bert", "--allow", "seeed"): "did you mean 'seed'?",
    ("plan", "quickstart_bert", "--json", "garbage"): "an override is written key=value",
    ("plan", "quickstart_bert", "--memory-budget", "x"): "bytes with a unit, such as 16GiB",
    ("plan", "quickstart_bert", "--memory-budget", ""): "bytes with a unit, such as 16GiB",
    ("plan", "quickstart_bert", "--world-size", "0"): "write 64, or for each doubling 8..1024",
    (
        "plan",
        "quickstart_bert",
        "--world-size",
        "3",
    ): "8 is not divisible by 3 ranks; nearest that are: 6, 9; or 1, 2, 4 or 8 ranks",
    ("plan", "gpt_7b", "--world-size", "48", "--device", "h100"): "or 1, 2, 4, 8, 16, 32, 64 or 128 ranks",
    ("plan", "quickstart_bert", "--device", "nonsense"): "write one of: cpu,",
    ("plan", "quickstart_bert", "--device", "t4", "amp.precision=bf16"): "it can fp32 and fp16",
    ("plan", "quickstart_bert", "--device", "a100-80gb", "amp.precision=fp8"): "it can fp32, fp16 and bf16",
    ("plan", "quickstart_bert", "--device", "cpu", "train.device=cuda"): "use auto, or another --device",
    ("eval", "/etc"): "give a run folder, or a step-NNNNNNNN folder in one",
    ("generate", "/dev/null", "--prompt", "x"): "give a run folder, or a step-NNNNNNNN folder in one",
    ("generate", "none"): "--prompt: give the text here",
    ("recipes", "show", "zzz"): "; there are bert_base, bert_large",
    ("nonsense",): "No such command 'nonsense'",
}

WORDS = [{"text": f"red green blue {n} stone river"} for n in range(60)]
LINES = [json.dumps(row) + "\n" for row in WORDS]


def with_line(number: int, line: str) -> str:
    return "".join([*LINES[: number - 1], line, *LINES[number:]])


DATA: dict[str, tuple[str | bytes, str]] = {
    "empty.jsonl": ("", "empty.jsonl: data.source: the file is empty; leave it out"),
    "blank.txt": ("\n \n", "blank.txt: data.source: the file holds no text; leave it out"),
    "broken.jsonl": (with_line(42, '{"text": "a\n'), "broken.jsonl:42: data.source: broken JSON"),
    "list.jsonl": (with_line(7, "[1]\n"), "list.jsonl:7: data.source: a list stands where a JSON object"),
    "number.jsonl": (with_line(7, '{"text": 3}\n'), "number.jsonl:7: data.text_column: column 'text' holds a number"),
    "absent.jsonl": (
        with_line(9, '{"txt": ""}\n'),
        "absent.jsonl:9: data.text_column: no column 'text'; there are: txt",
    ),
    "latin.txt": ("é a\n".encode("latin-1"), "latin.txt: data.source: not UTF-8 text: byte 0xe9 at offset 0"),
    "binary.txt": (bytes(range(256)) * 9, "binary.txt: data.source: not UTF-8 text: byte 0x80 at offset 128"),
    "absent.csv": ("a,b\n1,2\n", "absent.csv:1: data.text_column: no column 'text'; there are: a, b; name another one"),
    "ragged.csv": ("text,b\nx,1\ny,2,3\n", "ragged.csv:3: data.source: 3 fields in a table of 2 columns; quote text"),
    "cut.txt.gz": (gzip.compress(os.urandom(9000))[:-99], "cut.txt.gz: data.source: "),
    "broken.parquet": (b"hello" * 99, "broken.parquet: data.source: cannot be read as .parquet"),
    "page.pdf": (b"%PDF", "unknown file type: ./page.pdf; known are .txt"),
}
