"""No file that is read runs code, nothing listens beyond loopback, no secret is written down: rows S1 to S4."""

from __future__ import annotations

import ast
import json
import os
import subprocess
import sys
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any, NamedTuple

import listeners
import pytest
from matrix import counted

from bigtrain.config.load import load_recipe
from bigtrain.rendering import Command, job_file

ROOT = Path(__file__).parents[2]
SHARED = ROOT / "tests" / "shared"
LARGEST_BYTES, LONGEST_SECONDS = 200 * 10**6, 2.0

NEVER_CALLED = {"eval", "exec", "__import__", "system", "popen", "unsafe_load", "full_load", "from_pretrained"}
NEVER_IMPORTED = {"pickle", "dill", "cloudpickle", "marshal", "shelve", "joblib"}
OF_OBJECTS = {
    f"{name}{end}"
    for name in ("all_gather", "gather", "broadcast", "scatter", "send", "recv")
    for end in ("_object", "_object_list")
}
"""torch's collectives that pickle what they send."""

SECRETS = (
    "AWS_SECRET_ACCESS_KEY", "AWS_SESSION_TOKEN", "AZURE_CLIENT_SECRET", "DATABASE_PASSWORD", "GITHUB_TOKEN",
    "GOOGLE_API_KEY", "HF_TOKEN", "OPENAI_API_KEY", "SLURM_JWT", "WANDB_API_KEY",
)  # fmt: skip

STARTED = {
    ("python", "-P -m bigtrain.data"): "tokenizes",
    ("python", "-P -m bigtrain.training"): "trains, one for each device",
    ("git", "rev-parse HEAD"): "the revision in env.json",
}
"""What a run may start, and why; torch and Python look for libraries with the others, below."""

LOOKS_FOR_LIBRARIES = {"ldconfig", "gcc", "cc", "ld", "objdump", "uname", "lscpu", "nvidia-smi", "c++", "g++"}


def modules() -> list[Path]:
    return sorted((ROOT / "bigtrain").rglob("*.py"))


def called(tree: ast.Module) -> Iterator[tuple[str, ast.Call]]:
    for node in ast.walk(tree):
        if isinstance(node, ast.Call):
            function = node.func
            yield (function.attr if isinstance(function, ast.Attribute) else getattr(function, "id", "")), node


def imported(tree: ast.Module) -> set[str]:
    found = {alias.name for node in ast.walk(tree) if isinstance(node, ast.Import) for alias in node.names}
    return found | {node.module or "" for node in ast.walk(tree) if isinstance(node, ast.ImportFrom)}


def unsafe(tree: ast.Module) -> list[str]:
    """Return what in a module could run what stands in a file, or unpickle what another rank sends."""
    found = [f"imports {name}" for name in imported(tree) if name.partition(".")[0] in NEVER_IMPORTED]
    for name, call in called(tree):
        owner = getattr(call.func, "value", None)
        of_torch = isinstance(owner, ast.Name) and owner.id in ("torch", "dist", "DCP", "dcp")
        bare = isinstance(call.func, ast.Name)
        named = {keyword.arg: keyword.value for keyword in call.keywords}
        if name in NEVER_CALLED and not (name in ("eval", "exec") and not bare):  # a module's eval() is a mode
            found.append(f"line {call.lineno} calls {name}")
        if (name == "compile" and bare) or (name in ("load", "save") and of_torch) or name in OF_OBJECTS:
            found.append(f"line {call.lineno} calls {name}")
        for option in ("trust_remote_code", "allow_pickle", "shell"):
            if option in named and getattr(named[option], "value", True) is not False:
                found.append(f"line {call.lineno} sets {option}")
    return found


def test_no_module_can_run_what_is_in_a_file() -> None:
    with counted("S1", "ci", "code") as counts:
        for path in modules():
            found = unsafe(ast.parse(path.read_text(encoding="utf-8")))
            counts.add(not found, f"{path.relative_to(ROOT)}: {found}")


@pytest.mark.parametrize(
    "source",
    [
        "import pickle", "from pickle import loads", "eval(text)", "exec(text)", "os.system(text)", "torch.load(path)",
        "dist.all_gather_object(found, here)", "np.load(path, allow_pickle=True)", "load(x, trust_remote_code=True)",
        "run(text, shell=True)", "yaml.unsafe_load(text)", "compile(text, 'x', 'exec')",
    ],
)  # fmt: skip
def test_what_could_is_found(source: str) -> None:
    assert unsafe(ast.parse(source))


@pytest.mark.parametrize(
    "source", ["model.eval()", "re.compile(x)", "np.load(path, allow_pickle=False)", "json.load(x)"]
)
def test_what_could_not_is_let_through(source: str) -> None:
    assert not unsafe(ast.parse(source))


@pytest.mark.slow
def test_hostile_files_are_refused(tmp_path: Path) -> None:
    argv = [sys.executable, str(SHARED / "hostile_run.py"), str(tmp_path)]
    environment = {**os.environ, "PYTHONPATH": str(SHARED), "OMP_NUM_THREADS": "1", "RUST_BACKTRACE": "0"}
    ran = subprocess.run(argv, capture_output=True, text=True, env=environment, check=False)
    assert ran.returncode == 0, ran.stderr[-3000:]
    found = [json.loads(line) for line in ran.stdout.splitlines() if line.startswith('{"name"')]
    assert len(found) >= 80
    with counted("S2", "ci") as counts:
        for one in found:
            refused = (one["exit_code"], len(one["lines"])) == (2, 1) or (one["passed_over"] and not one["kind"])
            counts.add(refused and not one["events"], f"{one['name']}: {one['kind']} {one['lines']} {one['events']}")
            counts.longest("processor seconds", round(one["seconds"], 2))
            counts.longest("resident bytes", one["bytes"])
        counts.figures["passed over, as damaged rows and rates are"] = sum(one["passed_over"] for one in found)
        counts.add(counts.figures["processor seconds"] < LONGEST_SECONDS, "the time")
        counts.add(counts.figures["resident bytes"] < LARGEST_BYTES, "the memory")


class Watched(NamedTuple):
    """What launches on two ranks and on one did: events of all processes, listeners, texts, and where files are."""

    events: list[dict[str, Any]]
    listening: set[tuple[str, int]]
    texts: list[str]
    folder: Path


def bigtrain(environment: dict[str, str], *arguments: object) -> subprocess.Popen[str]:
    argv = [sys.executable, "-m", "bigtrain", *map(str, arguments)]
    return subprocess.Popen(argv, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True, env=environment)


@pytest.fixture(scope="module")
def watched(tmp_path_factory: pytest.TempPathFactory, corpus_file: Path) -> Watched:
    folder = tmp_path_factory.mktemp("watched")
    (folder / "r.yaml").write_text(
        "model: {family: gpt, hidden_size: 32, num_hidden_layers: 2, num_attention_heads: 2}\n"
        f"data: {{source: {corpus_file}, vocab_size: 300, sequence_length: 32, validation_fraction: 0.1}}\n"
        "train: {objective: clm, global_batch_size: 8, steps: 40, eval_every: 20, device: cpu, compile: false}\n"
        "optimizer: {learning_rate: 1e-2, warmup_steps: 0}\n"
        "checkpoint: {every_steps: 10}\n"
        "logging: {every_steps: 1}\n"
    )
    environment = {**os.environ, "OMP_NUM_THREADS": "1", "BIGTRAIN_CACHE": str(folder / "cache")}
    environment |= {"PYTHONPATH": str(SHARED / "watched"), "WATCHED_EVENTS": str(folder / "events.jsonl")}
    environment |= {name: secret(name) for name in SECRETS}
    run, listening, texts = ("--run-dir", folder / "run"), set(), []
    for arguments, code in (
        (("launch", folder / "r.yaml", "cluster.devices_per_node=2", *run), 0),
        (("launch", folder / "r.yaml", "cluster.devices_per_node=2", "train.steps=50", *run), 0),
        (("launch", folder / "r.yaml", "train.steps=60", *run), 0),
        (("launch", folder / "r.yaml", "seed=7", *run), 2),
    ):
        process = bigtrain(environment, *arguments)
        while process.poll() is None:
            listening |= listeners.of_tree(process.pid)
            time.sleep(0.2)
        texts += [*process.communicate()]
        assert process.returncode == code, texts[-1][-3000:]
    events = [json.loads(line) for line in (folder / "events.jsonl").read_text().splitlines()]
    return Watched(events, listening, texts, folder)


def secret(name: str) -> str:
    return f"planted-{name[::-1]}-31415926"


def is_known(command: list[str]) -> bool:
    program = Path(command[0]).name
    rest = " ".join(command[1:])
    known = any(program.startswith(name) and rest.startswith(start) for name, start in STARTED)
    return known or program in LOOKS_FOR_LIBRARIES


@pytest.mark.slow
def test_a_run_unpickles_nothing_and_starts_what_is_known(watched: Watched) -> None:
    with counted("S1", "ci", "audit") as counts:
        processes = {event["process"] for event in watched.events if event["event"] == "watching"}
        counts.add(len(processes) >= 9, f"{len(processes)} processes were watched")
        counts.figures["processes watched"] = len(processes)
        for event in watched.events:
            if event["event"] == "subprocess.Popen":
                counts.add(is_known(event["details"]), f"started: {event['details']}")
            elif event["event"] != "watching":
                counts.add(False, str(event))


@pytest.mark.slow
def test_ranks_listen_on_loopback_alone(watched: Watched) -> None:
    with counted("S3", "ci") as counts:
        assert watched.listening  # the store of the two ranks, and gloo
        for address, port in sorted(watched.listening):
            counts.add(listeners.is_loopback(address), f"{address}:{port}")


@pytest.mark.slow
def test_secrets_are_written_nowhere(watched: Watched, monkeypatch: pytest.MonkeyPatch) -> None:
    for name in SECRETS:
        monkeypatch.setenv(name, secret(name))
    jobs = ["train.device=cpu", "cluster.image=r/i:t", "cluster.volume=claim"]
    recipe = load_recipe(watched.folder / "r.yaml", jobs)
    rendered = [job_file(kind, recipe, Command("r.yaml")) for kind in ("slurm", "kubernetes", "trainjob")]
    written = {
        path: path.read_bytes()
        for place in ("run", "cache")
        for path in (watched.folder / place).rglob("*")
        if path.is_file()
    }
    assert {"env.json", "plan.yaml", "report.html", "metrics.jsonl", "tokenizer.json"} <= {
        path.name for path in written
    }
    everything = b"".join([*written.values(), *(text.encode() for text in (*rendered, *watched.texts))])
    with counted("S4", "ci") as counts:
        counts.figures |= {"files read": len(written), "job files": len(rendered), "outputs": len(watched.texts)}
        for name in SECRETS:
            counts.add(secret(name).encode() not in everything, name)
