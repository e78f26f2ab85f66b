"""What holds for every test: one thread a worker, no network, no file outside temporary folders."""

from __future__ import annotations

import json
import os
import shutil
import tempfile
from collections.abc import Iterator
from pathlib import Path

import pytest

SEED = 1234
TEMPORARY = pytest.StashKey[Path]()

# Read by libraries when they are first imported, so set before any test module is.
os.environ.update(HF_HUB_OFFLINE="1", HF_HUB_DISABLE_TELEMETRY="1", MPLBACKEND="Agg")
if "PYTEST_XDIST_WORKER" in os.environ:
    # Each worker has a core of its own; more threads than cores only wait for each other.
    os.environ.setdefault("OMP_NUM_THREADS", "1")


def pytest_configure(config: pytest.Config) -> None:
    """Point every cache at one temporary folder, which xdist's workers inherit from the process that starts them."""
    if hasattr(config, "workerinput"):
        return
    folder = Path(tempfile.mkdtemp(prefix="bigtrain-tests-"))
    config.stash[TEMPORARY] = folder
    os.environ["BIGTRAIN_CACHE"] = str(folder / "bigtrain")
    os.environ["HF_HOME"] = str(folder / "huggingface")


def pytest_unconfigure(config: pytest.Config) -> None:
    """Remove that folder."""
    folder = config.stash.get(TEMPORARY, None)
    if folder is not None:
        shutil.rmtree(folder, ignore_errors=True)


@pytest.hookimpl(trylast=True)
def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    """Begin with files that take long, so that workers end together, and skip what needs CUDA where there is none.

    torch is imported only if such a test was asked for.
    """
    if "PYTEST_XDIST_WORKER" in os.environ:
        long = {item.path for item in items if item.get_closest_marker("slow")}
        items.sort(key=lambda item: item.path not in long)
    for_gpu = [item for item in items if item.get_closest_marker("gpu")]
    if not for_gpu:
        return
    import torch

    if not torch.cuda.is_available():
        for item in for_gpu:
            item.add_marker(pytest.mark.skip(reason="no CUDA device"))


@pytest.fixture
def torch_seed() -> Iterator[int]:
    """Seed torch for one test, and put its generator back afterwards."""
    import torch

    with torch.random.fork_rng():
        torch.manual_seed(SEED)
        yield SEED


@pytest.fixture(scope="session")
def corpus_file() -> Path:
    """Return a file of 600 short documents that have something to learn: each word decides the next."""
    words = ["red", "green", "blue", "stone", "river", "tree", "bird", "sings", "falls", "grows", "slowly", "again"]
    path = Path(os.environ["BIGTRAIN_CACHE"]).parent / "tiny.jsonl"
    if not path.is_file():
        texts = [" ".join(words[(n * 5 + k * (n % 3 + 1)) % 12] for k in range(6 + n % 17)) for n in range(600)]
        aside = path.with_suffix(f".{os.getpid()}")
        aside.write_text("".join(json.dumps({"text": text}) + "\n" for text in texts))
        aside.replace(path)
    return path


@pytest.fixture
def tiny_recipes(tmp_path: Path, corpus_file: Path) -> dict[str, Path]:
    """Return recipe files of a BERT and a GPT that take milliseconds a step."""
    recipes = {}
    for family, objective in (("bert", "mlm"), ("gpt", "clm")):
        recipes[family] = tmp_path / f"tiny_{family}.yaml"
        recipes[family].write_text(
            f"model: {{family: {family}, hidden_size: 32, num_hidden_layers: 2, num_attention_heads: 2}}\n"
            f"data: {{source: {corpus_file}, vocab_size: {120 if family == 'bert' else 300}, sequence_length: 32,\n"
            f"       validation_fraction: 0.1}}\n"
            f"train: {{objective: {objective}, global_batch_size: 8, micro_batch_size: 4, steps: 12, eval_every: 6,\n"
            f"        dropout: 0.1, device: cpu}}\n"
            f"optimizer: {{learning_rate: 1e-2, warmup_steps: 10%}}\n"
            f"checkpoint: {{every_steps: 5}}\n"
            f"logging: {{every_steps: 1, trackers: []}}\n"
        )
    return recipes
