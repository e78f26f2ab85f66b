"""The price of ranks: what each holds and sends is what is predicted, on real ranks over gloo, through the profile.

A choice of cases that covers families, stages, worlds and mechanisms: weights, gradients, optimizer states to the byte,
the peak but for scalars, the bytes of a step's collectives.
"""

from __future__ import annotations

import json
import math
import random
from collections.abc import Callable
from pathlib import Path
from typing import Any, NamedTuple

import pytest
from rank_run import told_by_first

from bigtrain.config.model import ModelConfig, resolve_model
from bigtrain.config.schema import Recipe
from bigtrain.memory.layout import layout_of
from bigtrain.memory.state import model_state
from bigtrain.models.shape import parameter_shapes
from bigtrain.sharding.cost import collectives, padded_elements

SCRIPT = Path(__file__).parent / "shared" / "rank_profile.py"
TOLERANCE = 0.0005
"""The scalars of a step, in models as small as these; 2% is what is promised."""
SCALARS = 300
"""Bytes of them, and of the gradient of a bias that selective recomputation in BERT makes sooner than predicted."""
ROWS = 2
"""Of a micro-batch."""
SECONDS = 600
"""For all cases of a world size; two idle cores take a tenth of it."""
LENGTH, VOCABULARY = 64, {"bert": 120, "gpt": 300, "llama": 300}
KEPT = ("weights", "master_weights", "optimizer_state")

LOW = {"amp": {"precision": "bf16", "master_weights": "fp32"}}
LEAN = {"amp": {"precision": "bf16", "master_weights": "split24"}, "optimizer": {"state": "8bit"}}
RELEASED = {
    **LEAN,
    "optimizer": {"state": "8bit", "gradient_release": True},
    "train": {"max_grad_norm": None},
    "recompute": {"policy": "full"},
}
FULL = {"recompute": {"policy": "full"}}
MIXED = {"recompute": {"policy": ["full", "none", "selective"]}}
DEEP = {"model": {"hidden_size": 140, "num_hidden_layers": 10, "intermediate_size": 560}}
"""Its blocks have 98% of the parameters, as those of large models."""


class Case(NamedTuple):
    """What is chosen, of so many micro-batches; `changed` are the recipe's sections."""

    family: str
    stage: int
    replicate: int = 1
    micro_batches: int = 1
    optimizer: str = "adamw"
    changed: dict[str, dict[str, Any]] = {}  # noqa: RUF012 - nobody changes it


CASES: dict[int, dict[str, Case]] = {
    2: {
        "plain 0": Case("bert", 0),
        "plain 1": Case("gpt", 1),
        "plain 2": Case("llama", 2),
        "plain 3": Case("gpt", 3),
        "deep 3": Case("gpt", 3, changed=DEEP),
        "split24 0, accumulated": Case("gpt", 0, 1, 3, changed=LEAN),
        "bf16 1, full, accumulated": Case("llama", 1, 1, 3, changed={**LOW, **FULL}),
        "mixed 2, accumulated": Case("bert", 2, 1, 3, changed=MIXED),
        "bf16 3, accumulated": Case("gpt", 3, 1, 2, changed=LOW),
        "split24 3": Case("bert", 3, changed=LEAN),
        "released 1": Case("bert", 1, changed=RELEASED),
        "lamb 3": Case("bert", 3, optimizer="lamb"),
        "adafactor 1, accumulated": Case("gpt", 1, 1, 2, "adafactor"),
        "muon 3": Case("llama", 3, optimizer="muon"),
    },
    4: {
        "plain 3": Case("llama", 3),
        "bf16 2, accumulated": Case("gpt", 2, 1, 2, changed=LOW),
        "hybrid 1, accumulated": Case("gpt", 1, 2, 2),
        "hybrid 2, bf16": Case("bert", 2, 2, changed=LOW),
        "hybrid 3, full, accumulated": Case("llama", 3, 2, 2, changed=FULL),
        "hybrid 3, split24, accumulated": Case("gpt", 3, 2, 2, changed=LEAN),
        "hybrid 3, lamb": Case("gpt", 3, 2, optimizer="lamb"),
        "adafactor 3": Case("bert", 3, optimizer="adafactor"),
    },
}
pytestmark = [pytest.mark.slow, pytest.mark.timeout(SECONDS + 60)]
NIGHTLY = ("plain 3", "bf16 2, accumulated", "hybrid 3, lamb", "adafactor 3")
"""On four ranks, whose mechanisms two ranks or other cases of four have too."""


def tier(world: int, name: str) -> str:
    """Return which group of processes goes through a case."""
    return "two" if world == 2 else "nightly" if name in NIGHTLY else "four"


ALL = [
    pytest.param(world, name, marks=pytest.mark.nightly if tier(world, name) == "nightly" else ())
    for world, cases in CASES.items()
    for name in cases
]
PLAIN_UPDATES = [case for case in ALL if CASES[case.values[0]][case.values[1]].optimizer == "adamw"]


def recipe_of(world: int, case: Case, corpus: Path) -> Recipe:
    """Return a recipe without `auto`; no number of rows of its parameters is a multiple of 4."""
    family, stage, replicate, count, optimizer, changed = case
    sections: dict[str, dict[str, Any]] = {
        "model": {
            "family": family,
            "hidden_size": 70,
            "num_hidden_layers": 3,
            "num_attention_heads": 5,
            "intermediate_size": 198,
        },
        "data": {
            "source": str(corpus),
            "vocab_size": VOCABULARY[family],
            "sequence_length": LENGTH,
            "validation_fraction": 0.01,
        },
        "train": {
            "objective": "mlm" if family == "bert" else "clm",
            "steps": 20,
            "global_batch_size": ROWS * count * world,
            "micro_batch_size": ROWS,
            "dropout": 0.1,
            "compile": False,
            "device": "cpu",
        },
        "optimizer": {"name": optimizer, "learning_rate": 1e-3, "state": "fp32", "gradient_release": False},
        "amp": {"precision": "fp32", "master_weights": "fp32"},
        "recompute": {"policy": "none"},
        "memory": {"budget": "2GiB"},
        "sharding": {"zero_stage": stage, "replicate": replicate if stage else world, "offload": "none"},
        "cluster": {"devices_per_node": world},
    }
    for section, keys in changed.items():
        sections[section] |= keys
    return Recipe.model_validate({"name": "price", **sections})


@pytest.fixture(scope="module")
def corpus(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Return a file of a few documents so long that all rows but their last ones are full."""
    draw = random.Random(1)
    words = ["".join(draw.choices("abcdefgh", k=draw.randint(3, 6))) for _ in range(300)]
    file = tmp_path_factory.mktemp("corpus") / "long.jsonl"
    texts = (" ".join(draw.choices(words, k=8000)) for _ in range(6))
    file.write_text("".join(json.dumps({"text": text}) + "\n" for text in texts))
    return file


Found = dict[str, list[dict[str, Any]]]
"""By case, what every rank finds."""
Told = Callable[[int, str], list[dict[str, Any]]]


@pytest.fixture(scope="module")
def two(corpus: Path, tmp_path_factory: pytest.TempPathFactory) -> Found:
    return found("two", corpus, tmp_path_factory.mktemp("ranks"))


@pytest.fixture(scope="module")
def four(corpus: Path, tmp_path_factory: pytest.TempPathFactory) -> Found:
    return found("four", corpus, tmp_path_factory.mktemp("ranks"))


@pytest.fixture(scope="module")
def nightly(corpus: Path, tmp_path_factory: pytest.TempPathFactory) -> Found:
    return found("nightly", corpus, tmp_path_factory.mktemp("ranks"))


@pytest.fixture
def told(request: pytest.FixtureRequest) -> Told:
    """Return what tells what every rank finds in a case."""
    return lambda world, name: request.getfixturevalue(tier(world, name))[name]


def found(group: str, corpus: Path, folder: Path) -> Found:
    """Let one group of processes go through all its cases."""
    world, file = 2 if group == "two" else 4, folder / "cases.json"
    cases = {name: case for name, case in CASES[world].items() if tier(world, name) == group}
    recipes = [recipe_of(world, case, corpus) for case in cases.values()]
    file.write_text(json.dumps([recipe.model_dump(mode="json") for recipe in recipes]))
    lines = told_by_first(SCRIPT, file, world, seconds=SECONDS)
    return {name: one["ranks"] for name, one in zip(cases, lines, strict=True)}


@pytest.mark.parametrize(("world", "name"), ALL)
def test_the_first_rank_holds_what_is_predicted(told: Told, corpus: Path, world: int, name: str) -> None:
    case, first = CASES[world][name], told(world, name)[0]
    recipe, accumulated = recipe_of(world, case, corpus), case.micro_batches > 1
    state = model_state(recipe, shape_of(recipe), accumulated=accumulated, device="cpu", world_size=world)
    for side in ("measured", "predicted"):
        assert {cause: first[side][cause] for cause in KEPT} == {cause: state[cause] for cause in KEPT}
        assert first["gradients"][side] == state["gradients"]
    assert abs(first["error"]) <= TOLERANCE


@pytest.mark.parametrize(("world", "name"), ALL)
def test_no_rank_holds_more(told: Told, world: int, name: str) -> None:
    """All have room for as much as the first, whose weights and gradients they hold; states are of what they have."""
    first, *others = told(world, name)
    for other in others:
        assert other["measured"]["weights"] == first["measured"]["weights"]
        assert other["gradients"]["measured"] == first["gradients"]["measured"]
        assert all(other["measured"][cause] <= first["predicted"][cause] for cause in KEPT)
        assert sum(other["measured"].values()) <= sum(first["predicted"].values()) * (1 + TOLERANCE)


@pytest.mark.parametrize(("world", "name"), ALL)
def test_causes_and_blocks_are_told_apart(told: Told, world: int, name: str) -> None:
    first = told(world, name)[0]
    assert first["measured"] == pytest.approx(first["predicted"], abs=SCALARS)
    for block in first["blocks"]:
        assert block["measured_bytes"] == pytest.approx(block["predicted_bytes"], abs=SCALARS), block["name"]


@pytest.mark.parametrize(("world", "name"), PLAIN_UPDATES)
def test_each_rank_sends_what_is_predicted(told: Told, corpus: Path, world: int, name: str) -> None:
    calls, sent = sent_in_a_step(recipe_of(world, CASES[world][name], corpus), world)
    for rank in told(world, name):
        assert rank["calls"] == calls
        assert rank["bytes"] == pytest.approx(sent, rel=1e-4)  # of each collective a whole number of bytes


@pytest.mark.parametrize(("name", "times"), [("plain 0", 1), ("plain 1", 1), ("plain 2", 1), ("deep 3", 1.5)])
def test_the_volumes_of_zero(told: Told, corpus: Path, name: str, times: float) -> None:
    """Of one micro-batch, beside those of a sum over ranks (Rajbhandari et al. 2020, arXiv 1910.02054, section 7)."""
    parameters = sum(map(math.prod, parameter_shapes(shape_of(recipe_of(2, CASES[2][name], corpus))).values()))
    whole_sum = 2 * 4 * parameters // 2
    for rank in told(2, name):
        assert sum(rank["bytes"].values()) / whole_sum == pytest.approx(times, rel=0.01)


def shape_of(recipe: Recipe) -> ModelConfig:
    return resolve_model(recipe.model, vocab_size=recipe.data.vocab_size, sequence_length=recipe.data.sequence_length)


def sent_in_a_step(recipe: Recipe, world: int) -> tuple[dict[str, int], dict[str, int]]:
    """Return the predicted numbers and bytes of a step's collectives, by kind and ranks."""
    layout, model = layout_of(recipe, world), shape_of(recipe)
    padded = {name: padded_elements(shape, layout.shards) for name, shape in parameter_shapes(model).items()}
    found = collectives(
        sum(padded.values()),
        layout.zero_stage,
        layout.shards,
        layout.replicate,
        recipe.train.global_batch_size // (world * ROWS),
        layout.number_bytes,
        layout.reduce_bytes,
        groups=model.num_hidden_layers + 1,
        outside=sum(size for name, size in padded.items() if not name.startswith("blocks.")),
    )
    calls = {f"{one.kind} {one.ranks}": one.calls for one in found}
    return calls, {f"{one.kind} {one.ranks}": one.sent_bytes for one in found}
