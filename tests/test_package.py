"""The wheel and the source archive hold what they should, and the wheel runs where there is no repository."""

from __future__ import annotations

import json
import os
import subprocess
import sys
import tarfile
import zipfile
from pathlib import Path

import pytest

import bigtrain

ROOT = Path(__file__).parents[1]
SDIST = f"bigtrain-{bigtrain.__version__}"
TINY = (
    *("model.hidden_size=32", "model.num_hidden_layers=1", "model.num_attention_heads=2", "model.intermediate_size=64"),
    *("data.sequence_length=32", "data.vocab_size=300", "train.steps=2", "train.eval_every=null", "train.device=cpu"),
    *("train.global_batch_size=2", "train.micro_batch_size=2", "train.compile=false", "logging.trackers=[]"),
)


def hatch(folder: Path, kind: str, where: Path) -> Path:
    """Build one archive of the sources in a folder, with what is installed here; return it."""
    call = f"from hatchling.build import build_{kind} as build; print(build({str(where)!r}))"
    made = subprocess.run([sys.executable, "-c", call], cwd=folder, capture_output=True, text=True, check=True)
    return where / made.stdout.split()[-1]


@pytest.fixture(scope="module")
def archives(tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, Path]:
    """Return a source archive of this repository, and the wheel that is built from it."""
    folder = tmp_path_factory.mktemp("archives")
    sources = hatch(ROOT, "sdist", folder)
    with tarfile.open(sources) as packed:
        packed.extractall(folder, filter="data")
    return sources, hatch(folder / SDIST, "wheel", folder)


def wheel_contents(wheel: Path) -> dict[str, bytes]:
    with zipfile.ZipFile(wheel) as packed:
        return {name: packed.read(name) for name in packed.namelist() if not name.endswith("/RECORD")}


@pytest.mark.slow
def test_archives_hold_what_they_should(archives: tuple[Path, Path], tmp_path: Path) -> None:
    sources, wheel = archives
    with tarfile.open(sources) as packed:
        names = {name.partition("/")[2] for name in packed.getnames()}
    assert {"pyproject.toml", "LICENSE", "README.md", "recipes/bert_large.yaml", "tests/test_package.py"} <= names
    assert any(name.startswith("docs/") for name in names)
    assert not [name for name in names if name.startswith((".ci", "runs/", ".venv", "build/"))]
    held = wheel_contents(wheel)
    modules = {
        f"bigtrain/{path.relative_to(ROOT / 'bigtrain').as_posix()}" for path in (ROOT / "bigtrain").rglob("*.py")
    }
    assert modules <= set(held)
    assert {"bigtrain/py.typed", "bigtrain/planner/devices.json"} <= set(held)
    shipped = {path.name for path in (ROOT / "recipes").glob("*.yaml")}
    assert {f"bigtrain/recipes/{name}" for name in shipped} <= set(held)
    assert not [name for name in held if not name.startswith(("bigtrain/", f"{SDIST}.dist-info/"))]
    assert wheel_contents(hatch(ROOT, "wheel", tmp_path)) == held


@pytest.mark.slow
def test_the_wheel_runs_without_the_repository(archives: tuple[Path, Path], tmp_path: Path) -> None:
    site, home = tmp_path / "site", tmp_path / "home"
    home.mkdir()
    install = ["install", "--quiet", "--no-deps", "--no-index", "--target", str(site), str(archives[1])]
    subprocess.run([sys.executable, "-m", "pip", *install], check=True)
    environment = {**os.environ, "PYTHONPATH": str(site), "BIGTRAIN_CACHE": str(tmp_path / "cache")}

    def run(*words: str) -> str:
        command = [sys.executable, "-m", "bigtrain", *words]
        done = subprocess.run(command, cwd=home, env=environment, capture_output=True, text=True, check=False)
        assert done.returncode == 0, done.stderr
        return done.stdout

    where = subprocess.run(
        [sys.executable, "-c", "import bigtrain; print(bigtrain.__file__)"],
        cwd=home, env=environment, capture_output=True, text=True, check=True,
    )  # fmt: skip
    assert Path(where.stdout.strip()).is_relative_to(site)
    assert "quickstart_gpt" in run("recipes")
    assert json.loads(run("plan", "bert_large", "--device", "rtx4090", "--json"))["device"] == "rtx4090"
    assert "next: bigtrain generate runs/quickstart_gpt" in run("launch", "quickstart_gpt", *TINY)
    rows = (home / "runs" / "quickstart_gpt" / "metrics.jsonl").read_text().splitlines()
    assert json.loads(rows[-1])["step"] == 2
    assert run("launch", "quickstart_gpt", *TINY, "--quiet") == ""
