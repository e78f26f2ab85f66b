"""Real ranks over gloo share products: the same run as one process, memory to the byte, the same checkpoints."""

from __future__ import annotations

import json
from functools import partial
from pathlib import Path
from typing import Any

import pytest
import torch
import torch.distributed as dist
from group import told_by_all
from hypothesis import given
from hypothesis import strategies as st
from torch import nn

from bigtrain.checkpoint.state import OPTIMIZER, WEIGHTS
from bigtrain.checkpoint.stored import StoredTensors
from bigtrain.config.model import resolve_model
from bigtrain.config.schema import Recipe
from bigtrain.errors import InputError
from bigtrain.memory.predict import buffer_bytes, predict
from bigtrain.memory.state import model_state
from bigtrain.models.build import build_model
from bigtrain.models.shape import parameter_shapes, shared_products
from bigtrain.planner import hardware
from bigtrain.planner.plan import plan
from bigtrain.planner.speed import Speed
from bigtrain.processor import has_slow_bf16
from bigtrain.sharding import step_cost, tensor
from bigtrain.sharding.part import Part

RANKS = Path(__file__).parent / "ranks_tensor.py"
TOLERANCE = 0.0005
"""The scalars of a step, in models as small as these; 2% is what is promised."""

SHAPE = {"hidden_size": 64, "num_hidden_layers": 3, "num_attention_heads": 4, "intermediate_size": 128}
LLAMA = {"family": "llama", "num_key_value_heads": 2, "tie_word_embeddings": False}
LOW = {"precision": "bf16", "master_weights": "fp32"}
LEAN = {"precision": "bf16", "master_weights": "split24"}

TWO: dict[str, dict[str, Any]] = {
    "bert": {"family": "bert", "uneven": True},
    "gpt, full": {"family": "gpt", "policy": "full", "micro": 1, "uneven": True},
    "llama": {"family": "llama", "saved": True},
    "gpt, released": {"family": "gpt", "micro": 4, "released": True},
    "bert, even": {"family": "bert", "policy": "selective", "dropout": 0.1},
    "llama, bf16": {"family": "llama", "policy": ["selective", "none", "full"], "amp": LOW},
    "gpt, split24": {"family": "gpt", "amp": LEAN, "state": "8bit", "micro": 1, "dropout": 0.1},
}
"""On two ranks, which are alone with each other."""

FOUR: dict[str, dict[str, Any]] = {
    "bert, stage 3": {"family": "bert", "stage": 3, "policy": "full", "uneven": True},
    "gpt, stage 0": {"family": "gpt", "stage": 0, "policy": "selective", "micro": 1, "uneven": True},
    "gpt, stage 3": {"family": "gpt", "stage": 3, "uneven": True},
    "llama, stage 2": {"family": "llama", "stage": 2, "policy": "full", "micro": 1, "amp": LOW},
    "llama, four": {"family": "llama", "ranks": 4, "amp": LOW, "heads": 4},
}
"""On four: two that share products read the same rows."""

CASES = {2: TWO, 4: FOUR}
BATCH = 4


def recipe_of(
    *,
    family: str,
    ranks: int = 2,
    stage: int = 0,
    micro: int = 2,
    policy: str | list[str] = "none",
    amp: dict[str, str] | None = None,
    state: str = "fp32",
    dropout: float = 0.0,
    heads: int = 2,
    released: bool = False,
    **_: Any,
) -> Recipe:
    """Return a recipe of a tiny model whose products so many ranks share."""
    shape = {"family": family, **SHAPE, **(LLAMA if family == "llama" else {})}
    if family == "llama":
        shape["num_key_value_heads"] = heads
    sections: dict[str, dict[str, Any]] = {
        "model": shape,
        "data": {"vocab_size": 500, "sequence_length": 32},
        "train": {
            "objective": "mlm" if family == "bert" else "clm",
            "global_batch_size": BATCH,
            "micro_batch_size": micro,
            "steps": 30,
            "dropout": dropout,
            "max_grad_norm": None if released else 1.0,
            "device": "cpu",
            "compile": False,
        },
        "optimizer": {"learning_rate": 1e-3, "state": state, "gradient_release": released},
        "amp": amp or {"precision": "fp32", "master_weights": "fp32"},
        "recompute": {"policy": policy},
        "sharding": {"zero_stage": stage, "tensor_parallel": ranks},
        "memory": {"budget": "4GiB"},
    }
    return Recipe.model_validate({"name": "shared", **sections})


def case_of(case: dict[str, Any], **more: Any) -> dict[str, Any]:
    recipe = recipe_of(**case).model_dump(mode="json")
    return {"recipe": recipe, "uneven": case.get("uneven", False), **more}


def train(cases: list[dict[str, Any]], world_size: int, folder: Path) -> list[list[dict[str, Any]]]:
    """Return what each rank found for each case."""
    written = folder / f"cases-{world_size}.json"
    written.write_text(json.dumps(cases))
    return told_by_all([RANKS, written], world_size)


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return tmp_path_factory.mktemp("ranks")


@pytest.fixture(scope="module")
def two(folder: Path) -> list[dict[str, Any]]:
    """Return what each of two ranks found, by case; the one to be saved comes with its checkpoint."""
    cases = [case_of(case, **({"save": str(folder / "two")} if "saved" in case else {})) for case in TWO.values()]
    return [dict(zip(TWO, rank, strict=True)) for rank in train(cases, 2, folder)]


@pytest.fixture(scope="module")
def four(folder: Path, two: list[dict[str, Any]]) -> list[dict[str, Any]]:
    """Return what each of four found, and under "restored" what goes on from the checkpoint of two."""
    restored = {"restore": two[0]["llama"]["saved"], "save": str(folder / "four")}
    cases = [*(case_of(case) for case in FOUR.values()), case_of(TWO["llama"] | {"stage": 3}, **restored)]
    return [dict(zip([*FOUR, "restored"], rank, strict=True)) for rank in train(cases, 4, folder)]


@pytest.fixture(scope="module")
def alone(folder: Path, four: list[dict[str, Any]]) -> dict[str, Any]:
    """Return what one process learns of each family, and goes on with from the checkpoint of four."""
    cases = [case_of({"family": family, "ranks": 1, "uneven": True}) for family in ("bert", "gpt")]
    cases += [case_of({"family": "llama", "ranks": 1}), case_of(TWO["gpt, released"] | {"ranks": 1})]
    restored = {"restore": four[0]["restored"]["saved"], "save": str(folder / "one")}
    cases.append(case_of({"family": "llama", "ranks": 1}, **restored))
    (rank,) = train(cases, 1, folder)
    return dict(zip(("bert", "gpt", "llama", "released", "restored"), rank, strict=True))


EXACT = [(world, name) for world, cases in CASES.items() for name, case in cases.items() if "amp" not in case]
EXACT = [(world, name) for world, name in EXACT if not CASES[world][name].get("dropout")]


@pytest.mark.slow
@pytest.mark.parametrize(("world", "name"), EXACT)
def test_the_same_run_as_one_process(
    world: int, name: str, two: list[dict[str, Any]], four: list[dict[str, Any]], alone: dict[str, Any]
) -> None:
    together = {2: two, 4: four}[world]
    case = CASES[world][name]
    expected = alone["released" if case.get("released") else case["family"]]["steps"]
    for rank in together:
        assert rank[name]["steps"] == [pytest.approx(step, rel=1e-5) for step in expected]
    assert expected[-1][0] < expected[0][0]


MEASURED = [(world, name) for world, cases in CASES.items() for name in cases if "bert" not in name or "even" in name]
"""Those whose micro-batches have as many labels as the prediction takes them to have."""


@pytest.mark.slow
@pytest.mark.parametrize(("world", "name"), MEASURED)
def test_a_rank_holds_what_is_predicted(
    world: int, name: str, two: list[dict[str, Any]], four: list[dict[str, Any]], monkeypatch: pytest.MonkeyPatch
) -> None:
    ranks = {2: two, 4: four}[world]
    real, made = ranks[0][name], plan(recipe_of(**CASES[world][name]), hardware.cpu(), world_size=world)
    recipe, model, accumulated = made.recipe, made.model, made.accumulation_steps > 1
    state = model_state(recipe, model, accumulated=accumulated, device="cpu", world_size=world)
    assert state["weights"] == real["weights"]
    assert state["master_weights"] + state["optimizer_state"] == real["optimizer_state"]
    assert state["gradients"] == real["gradients"]
    buffers = buffer_bytes(recipe, model, accumulated=accumulated, device="cpu", world_size=world)
    assert buffers == real["buffers"]
    predicted = partial(predict, recipe, model, device="cpu", slow_bf16=has_slow_bf16(), world_size=world, threads=1)
    most = predicted().allocated_bytes_peak
    monkeypatch.setattr(step_cost, "COPYING", ())
    assert predicted().allocated_bytes_peak == pytest.approx(real["peak"], rel=TOLERANCE)
    # A rank whose thread of gloo's is late still holds its copies of what is summed.
    assert all(rank[name]["peak"] <= max(most, real["peak"]) * (1 + TOLERANCE) for rank in ranks)


@pytest.mark.slow
@pytest.mark.parametrize(("world", "name"), [(world, name) for world, cases in CASES.items() for name in cases])
def test_ranks_send_what_is_predicted(
    world: int, name: str, two: list[dict[str, Any]], four: list[dict[str, Any]]
) -> None:
    calls, summed = {2: two, 4: four}[world][0][name]["sums"]
    made = plan(recipe_of(**CASES[world][name]), hardware.cpu(), world_size=world)
    speed = Speed(made.recipe, made.model, made.hardware, world)
    (sent,) = [one.collective for one in speed.transfers(made.choice) if one.collective.scope == "tensor"]
    assert sent.calls == calls
    assert sent.sent_bytes == summed * 2 * (sent.ranks - 1) // sent.ranks
    assert made.recipe.sharding.tensor_parallel == sent.ranks


@pytest.mark.slow
def test_a_checkpoint_is_read_by_any_ranks(
    two: list[dict[str, Any]], four: list[dict[str, Any]], alone: dict[str, Any]
) -> None:
    first, *others = (found["saved"] for found in (two[0]["llama"], four[0]["restored"], alone["restored"]))
    for file in (WEIGHTS, OPTIMIZER):
        kept = dict(StoredTensors(Path(first), file).whole())
        assert len(kept) >= 21
        for folder in others:
            again = dict(StoredTensors(Path(folder), file).whole())
            assert kept.keys() == again.keys()
            assert all(torch.equal(value, again[name]) for name, value in kept.items())
    expected = two[0]["llama"]["next"]
    for found in (four[0]["restored"], alone["restored"]):
        assert found["next"] == [pytest.approx(step, rel=1e-5) for step in expected]


class Group:
    """A rank of a group that nobody speaks in."""

    def __init__(self, monkeypatch: pytest.MonkeyPatch, rank: int, size: int) -> None:
        monkeypatch.setattr(dist, "get_rank", lambda group=None: rank)
        monkeypatch.setattr(dist, "get_world_size", lambda group=None: size)
        self.group_name = "a group"


def model_of(family: str) -> Any:
    recipe = recipe_of(family=family)
    torch.manual_seed(0)
    return build_model(resolve_model(recipe.model, vocab_size=500, sequence_length=32))


@pytest.mark.parametrize("family", ["bert", "gpt", "llama"])
def test_ranks_have_the_whole_model_between_them(family: str, monkeypatch: pytest.MonkeyPatch) -> None:
    whole = dict(model_of(family).named_parameters())
    left = {name: torch.full_like(value, torch.nan) for name, value in whole.items()}
    for rank in range(2):
        group: Any = Group(monkeypatch, rank, 2)
        model = model_of(family)
        shared = tensor.share(model, list(model.blocks), shared_products(model.config), group)
        assert {name: tuple(p.shape) for name, p in model.named_parameters()} == parameter_shapes(model.config, 2)
        for name, parameter in model.named_parameters():
            put(left[name], shared.part(name, Part.of_whole(tuple(parameter.shape))), parameter.detach())
            assert shared.copies(name) == (1 if name in shared.parts else 2)
    assert all(torch.equal(left[name], value) for name, value in whole.items())


def put(whole: torch.Tensor, part: Part, values: torch.Tensor) -> None:
    """Put the boxes of a part into the tensor that it is a part of."""
    first = 0
    for box in part.boxes:
        place = tuple(slice(start, start + count) for start, count in zip(box.start, box.shape, strict=True))
        whole[place] = values[first : first + box.shape[0]]
        first += box.shape[0]


def test_shared_layers_add_up_to_the_plain_ones(monkeypatch: pytest.MonkeyPatch) -> None:
    parts, x, products = [], torch.randn(5, 8), {"up": (0, (12,)), "down": (1, (12,))}
    torch.manual_seed(0)
    plain = nn.Sequential()
    plain.up, plain.down = nn.Linear(8, 12), nn.Linear(12, 8)
    expected = plain.down(plain.up(x))
    monkeypatch.setattr(tensor, "sum_over_ranks", lambda partial, bias, group: parts.append((partial, bias)) or partial)
    for rank in range(2):
        group: Any = Group(monkeypatch, rank, 2)
        mine = nn.Sequential()
        mine.up, mine.down = nn.Linear(8, 12), nn.Linear(12, 8)
        mine.load_state_dict(plain.state_dict())
        tensor.share(mine, [mine], products, group).connect()
        assert (mine.up.out_features, mine.down.in_features) == (6, 6)
        mine.down(mine.up(x))
        assert mine.down.bias is not None
    (one, bias), (other, _) = parts
    torch.testing.assert_close(one + other + bias, expected)


@given(st.lists(st.integers(1, 5), min_size=1, max_size=3), st.integers(1, 4))
def test_each_rank_has_its_part_of_each_section(sections: list[int], ranks: int) -> None:
    sizes = [size * ranks for size in sections]
    found = [list(tensor._runs(sizes, rank, ranks)) for rank in range(ranks)]
    assert all([count for _, count in runs] == sections for runs in found)
    rows = sorted(row for runs in found for first, count in runs for row in range(first, first + count))
    assert rows == list(range(sum(sizes)))


def test_what_cannot_be_shared_so(monkeypatch: pytest.MonkeyPatch) -> None:
    group: Any = Group(monkeypatch, 0, 3)
    model = model_of("gpt")
    share = partial(tensor.share, model, list(model.blocks), group=group)
    with pytest.raises(InputError, match=r"3 does not divide attention\.qkv's sections"):
        share(shared_products(model.config))
    with pytest.raises(InputError, match=r"a Block has no linear layer 'attention\.query'.*zero_stage"):
        share({"attention.query": (0, (3,))})
    assert model.blocks[0].attention.heads == (4, 4)
