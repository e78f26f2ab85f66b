"""512 ranks, of which one is real: what it holds and sends is what is predicted, to the byte."""

from __future__ import annotations

import json
import math
import os
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest

from bigtrain.config.model import ModelConfig, resolve_model
from bigtrain.config.schema import Recipe
from bigtrain.memory.state import model_state
from bigtrain.models.shape import parameter_shapes
from bigtrain.sharding.cost import Layout, collectives, padded_elements

FAKE_RANKS = Path(__file__).parent / "fake_ranks.py"
WORLD_SIZE = 512
ODD = {"family": "gpt", "hidden_size": 72, "num_hidden_layers": 3, "num_attention_heads": 4, "intermediate_size": 200}
"""Few of its parameters have a multiple of 512 rows, or of 64."""

EVEN = {**ODD, "hidden_size": 512, "num_hidden_layers": 8, "intermediate_size": 2048, "max_position_embeddings": 512}
"""All of its rows are multiples of 512, so that nothing is padded."""

LLAMA = {**ODD, "family": "llama", "num_key_value_heads": 2, "tie_word_embeddings": False}
LOW = {"precision": "bf16", "master_weights": "fp32"}
LEAN = {"precision": "bf16", "master_weights": "split24"}

CASES: dict[str, dict[str, Any]] = {
    "stage 0": {"stage": 0},
    "stage 1": {"stage": 1},
    "stage 1, accumulated": {"stage": 1, "steps": 3},
    "stage 2": {"stage": 2},
    "stage 2, accumulated": {"stage": 2, "steps": 3},
    "stage 3": {"stage": 3},
    "stage 3, accumulated": {"stage": 3, "steps": 3},
    "stage 3, bf16": {"stage": 3, "amp": LOW, "model": LLAMA},
    "hybrid 64 x 8, stage 1": {"stage": 1, "replicate": 64, "model": LLAMA},
    "hybrid 64 x 8, stage 2, accumulated": {"stage": 2, "replicate": 64, "steps": 2, "amp": LOW},
    "hybrid 64 x 8, stage 3, accumulated": {"stage": 3, "replicate": 64, "steps": 2},
    "hybrid 8 x 64, stage 3, split24": {"stage": 3, "replicate": 8, "steps": 2, "amp": LEAN, "state": "8bit"},
    "even, stage 0": {"stage": 0, "model": EVEN},
    "even, stage 1": {"stage": 1, "model": EVEN},
    "even, stage 2": {"stage": 2, "model": EVEN},
    "even, stage 3": {"stage": 3, "model": EVEN},
}


def recipe_of(
    *,
    stage: int,
    replicate: int = 1,
    steps: int = 1,
    model: dict[str, Any] = ODD,
    amp: dict[str, Any] | None = None,
    state: str = "fp32",
) -> Recipe:
    """Return a recipe without `auto` whose ranks take so many micro-batches of one row each."""
    sections: dict[str, dict[str, Any]] = {
        "model": model,
        "data": {"vocab_size": 512 if model is EVEN else 500, "sequence_length": 16},
        "train": {
            "objective": "clm",
            "global_batch_size": WORLD_SIZE * steps,
            "micro_batch_size": 1,
            "steps": 10,
            "dropout": 0.0,
            "device": "cpu",
            "compile": False,
        },
        "optimizer": {"learning_rate": 1e-3, "state": state, "gradient_release": False},
        "amp": amp or {"precision": "fp32", "master_weights": "fp32"},
        "recompute": {"policy": "none"},
        "sharding": {"zero_stage": stage, "replicate": replicate, "offload": "none"},
        "memory": {"budget": "8GiB"},
    }
    return Recipe.model_validate({"name": "many", **sections})


@pytest.fixture(scope="module")
def found(tmp_path_factory: pytest.TempPathFactory) -> dict[str, dict[str, Any]]:
    """Return what the first of 512 ranks found, by case."""
    cases = tmp_path_factory.mktemp("fake") / "cases.json"
    cases.write_text(json.dumps([recipe_of(**case).model_dump(mode="json") for case in CASES.values()]))
    command = [sys.executable, str(FAKE_RANKS), str(WORLD_SIZE), str(cases)]
    environment = {**os.environ, "OMP_NUM_THREADS": "1", "PYTHONPATH": str(FAKE_RANKS.parents[1] / "shared")}
    ran = subprocess.run(command, capture_output=True, text=True, timeout=580, env=environment, check=False)
    assert ran.returncode == 0, ran.stderr
    lines = [json.loads(line) for line in ran.stdout.splitlines() if line.startswith("{")]
    return dict(zip(CASES, lines, strict=True))


def shape_of(recipe: Recipe) -> ModelConfig:
    return resolve_model(recipe.model, vocab_size=recipe.data.vocab_size, sequence_length=recipe.data.sequence_length)


def predicted(recipe: Recipe) -> tuple[dict[str, int], dict[str, int]]:
    """Return numbers and bytes of a step's collectives, by kind and ranks."""
    layout, model = Layout.of(recipe, WORLD_SIZE, 4 if recipe.amp.master_weights == "fp32" else 2), shape_of(recipe)
    padded = {name: padded_elements(shape, layout.shards) for name, shape in parameter_shapes(model).items()}
    sent = collectives(
        sum(padded.values()),
        layout.zero_stage,
        layout.shards,
        layout.replicate,
        recipe.train.global_batch_size // WORLD_SIZE,
        layout.number_bytes,
        layout.reduce_bytes,
        groups=model.num_hidden_layers + 1,
        outside=sum(size for name, size in padded.items() if not name.startswith("blocks.")),
    )
    calls = {f"{one.kind} {one.ranks}": one.calls for one in sent}
    return calls, {f"{one.kind} {one.ranks}": one.sent_bytes for one in sent}


@pytest.mark.slow
@pytest.mark.parametrize("name", CASES)
def test_the_first_rank_holds_what_is_predicted(name: str, found: dict[str, dict[str, Any]]) -> None:
    recipe, real = recipe_of(**CASES[name]), found[name]
    accumulated = CASES[name].get("steps", 1) > 1
    state = model_state(recipe, shape_of(recipe), accumulated=accumulated, device="cpu", world_size=WORLD_SIZE)
    assert state["weights"] == real["weights"]
    assert state["gradients"] == real["gradients"]
    assert state["master_weights"] + state["optimizer_state"] == real["optimizer_state"]


@pytest.mark.slow
@pytest.mark.parametrize("name", CASES)
def test_it_sends_what_is_predicted(name: str, found: dict[str, dict[str, Any]]) -> None:
    calls, sent = predicted(recipe_of(**CASES[name]))
    assert found[name]["calls"] == calls
    assert found[name]["bytes"] == pytest.approx(sent, rel=1e-4)  # of each collective a whole number of bytes


@pytest.mark.slow
def test_the_volumes_of_zero(found: dict[str, dict[str, Any]]) -> None:
    """Stages 1 and 2 send what a sum does (arXiv 1910.02054, section 7); 3 gathers the blocks once more."""
    sent = [sum(found[f"even, stage {stage}"]["bytes"].values()) for stage in (0, 1, 2, 3)]
    shapes = parameter_shapes(shape_of(recipe_of(stage=0, model=EVEN)))
    blocks = {name: math.prod(shape) for name, shape in shapes.items() if name.startswith("blocks.")}
    again = sum(blocks.values()) / sum(map(math.prod, shapes.values()))
    assert [each / sent[0] for each in sent] == pytest.approx([1, 1, 1, 1 + again / 2], rel=1e-4)
    assert again > 0.97 and sent[3] / sent[0] == pytest.approx(1.5, rel=0.01)


@pytest.mark.slow
def test_small_models_pay_for_padding(found: dict[str, dict[str, Any]]) -> None:
    """A row for each of 512 ranks is the least, whatever a parameter has."""
    even, odd = (
        sum(found[f"{kind}stage 3"]["bytes"].values()) / sum(found[f"{kind}stage 0"]["bytes"].values())
        for kind in ("even, ", "")
    )
    assert odd > 1.2 * even
