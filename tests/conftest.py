"""What holds for every test: one thread a worker, no network, no file outside temporary folders."""

from __future__ import annotations

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
    """Skip what needs CUDA where there is none; torch is imported only if such a test was asked for."""
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
