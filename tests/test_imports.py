"""Planning, the launcher and the command line import neither torch nor the data libraries.

The import contracts in pyproject.toml do not see what a package's `__init__` brings along; importing does.
"""

from __future__ import annotations

import json
import subprocess
import sys
from pathlib import Path

import pytest

import bigtrain

PACKAGE = Path(bigtrain.__file__).parent
HEAVY = ("torch", "datasets", "tokenizers", "transformers", "accelerate", "deepspeed", "pyarrow", "tensorboard")
LEAN = (
    "__init__.py",
    "*/__init__.py",
    "*/cost.py",
    "amp/rules.py",
    "batch.py",
    "charts/*.py",
    "cli.py",
    "config/*.py",
    "errors.py",
    "launcher.py",
    "ledger.py",
    "memory/allocator.py",
    "memory/blockwise.py",
    "memory/compose.py",
    "memory/layout.py",
    "memory/picture.py",
    "memory/predict.py",
    "memory/profiled.py",
    "memory/record.py",
    "memory/report.py",
    "memory/tape.py",
    "models/*_cost.py",
    "models/shape.py",
    "optim/kernels.py",
    "optim/schedule.py",
    "planner/*.py",
    "recipe_commands.py",
    "recompute/policy.py",
    "rendering/*.py",
    "rendezvous.py",
    "sharding/*cost.py",
    "slurm.py",
    "spawner.py",
    "translation/*.py",
    "units.py",
    "world.py",
)
"""Files that must be importable without the heavy libraries, as patterns below bigtrain/."""

IMPORT_EACH = """
import importlib, json, sys

class Refuse:
    def find_spec(self, name, path=None, target=None):
        if name.partition(".")[0] in refused:
            raise ModuleNotFoundError(f"{name} is imported", name=name)

refused, modules = json.loads(sys.argv[1])
sys.meta_path.insert(0, Refuse())
faults = {}
for module in modules:
    try:
        importlib.import_module(module)
    except ModuleNotFoundError as error:
        faults[module] = str(error)
print(json.dumps(faults))
"""

RUN_COMMAND = """
import json, sys
from bigtrain.cli import main

code = 0
try:
    main()
except SystemExit as stop:
    code = stop.code or 0
print(json.dumps([code, sorted({name.partition(".")[0] for name in sys.modules})]))
"""


def module_name(path: Path) -> str:
    parts = ("bigtrain", *path.relative_to(PACKAGE).with_suffix("").parts)
    return ".".join(parts[:-1] if parts[-1] == "__init__" else parts)


def lean_modules() -> list[str]:
    return sorted({module_name(path) for pattern in LEAN for path in PACKAGE.glob(pattern)})


def run_python(code: str, *arguments: str) -> str:
    finished = subprocess.run(
        [sys.executable, "-c", code, *arguments], capture_output=True, text=True, timeout=60, check=False
    )
    assert finished.returncode == 0, finished.stderr
    return finished.stdout


@pytest.fixture(scope="module")
def import_faults() -> dict[str, str]:
    """What went wrong when one process without the heavy libraries imported every lean module."""
    faults: dict[str, str] = json.loads(run_python(IMPORT_EACH, json.dumps([HEAVY, lean_modules()])))
    return faults


@pytest.mark.parametrize("module", lean_modules())
def test_imports_without_heavy_libraries(module: str, import_faults: dict[str, str]) -> None:
    assert module not in import_faults, import_faults.get(module)


@pytest.mark.parametrize("library", HEAVY)
def test_refusal_is_noticed(library: str) -> None:
    faults = json.loads(run_python(IMPORT_EACH, json.dumps([[library], [library, f"{library}.inside", "json"]])))
    assert set(faults) == {library, f"{library}.inside"}


@pytest.mark.parametrize("pattern", LEAN)
def test_pattern_names_files(pattern: str) -> None:
    """A renamed file must not drop out of the list unseen."""
    folder = PACKAGE / Path(pattern).parent
    assert list(PACKAGE.glob(pattern)) or not ("*" in folder.name or folder.is_dir()), f"{pattern} matches no file"


@pytest.mark.parametrize("arguments", [["--help"], ["recipes"], ["plan", "--help"]], ids=" ".join)
def test_command_stays_lean(arguments: list[str]) -> None:
    code, loaded = json.loads(run_python(RUN_COMMAND, *arguments).splitlines()[-1])
    assert code == 0
    assert not set(HEAVY) & set(loaded)
    assert "numpy" not in loaded


STEP = """
import json, sys
import bigtrain
from bigtrain.training.build import build_engine

keys = ["train.device=cpu", "model.hidden_size=16", "model.num_attention_heads=2", "data.vocab_size=300"]
plan = bigtrain.plan(bigtrain.load_recipe(sys.argv[1], keys))
import torch

engine = build_engine(plan)
ids = torch.randint(5, 300, (plan.recipe.train.global_batch_size, 128))
batch = {"input_ids": ids, "labels": ids, "document_lengths": torch.full((len(ids), 1), 128)}
for micro in engine.micro_batches(batch):
    engine.backward(engine.model(**micro))
engine.step()
print(json.dumps(sorted(sys.modules)))
"""


def test_a_step_in_one_process_loads_no_compiler_and_no_sharding() -> None:
    """They would be 100 MB of resident memory, and two seconds of its start."""
    loaded = json.loads(run_python(STEP, "quickstart_bert").splitlines()[-1])
    heavy = {"torch._dynamo", "torch._inductor", "torch.distributed.fsdp", "torch.distributed.tensor", "sympy"}
    assert "bigtrain.engine" in loaded and not heavy & set(loaded)
