"""States of optimizers: from any ranks to any ranks."""

from __future__ import annotations

from functools import partial
from pathlib import Path
from typing import Any

import pytest
import torch
from ranks_apart import CutEngine, cut, cut_engine, on_ranks, rows_of, step, succeeded
from torch import Tensor, nn

from bigtrain.checkpoint.optimizer import load_optimizer, optimizer_state, own_states, state_format
from bigtrain.checkpoint.state import OPTIMIZER
from bigtrain.checkpoint.store import CheckpointStore
from bigtrain.checkpoint.stored import StoredTensors, file_name
from bigtrain.errors import CheckpointError
from bigtrain.optim import Adafactor, AdamW, Lamb, Muon
from bigtrain.world import ALONE, World

LAYOUTS = (4, 2, 1, 4, 3, 5)


class Model(nn.Module):
    """A matrix whose rows are whole blocks, one of few rows, and a vector."""

    def __init__(self, dtype: torch.dtype = torch.float32) -> None:
        super().__init__()
        self.wide = nn.Linear(256, 64, dtype=dtype)
        self.short = nn.Linear(5, 3, bias=False, dtype=dtype)


def build(name: str, parameters: list[nn.Parameter], state: str = "fp32", master_weights: str = "fp32") -> Any:
    options: dict[str, Any] = {"lr": 1e-2, "master_weights": master_weights}
    if name == "muon":
        matrices = [p for p in parameters if p.ndim == 2]
        groups = [{"params": matrices, "orthogonal": True}, {"params": [p for p in parameters if p.ndim < 2]}]
        return Muon(groups, state=state, **options)
    if name == "adafactor":
        return Adafactor(parameters, **options)
    if name == "sgd":
        return torch.optim.SGD(parameters, lr=1e-2, momentum=0.9)
    return {"adamw": AdamW, "lamb": Lamb}[name](parameters, state=state, **options)


def engine_on(world: World, name: str, seed: int = 0, shards: int | None = None, **formats: str) -> CutEngine:
    torch.manual_seed(seed)
    dtype = torch.float32 if formats.get("master_weights", "fp32") == "fp32" else torch.bfloat16
    return cut_engine(Model(dtype), partial(build, name, **formats), world, shards)


def fill(engine: CutEngine) -> None:
    """Give each rank its part of states that are the same whole ones on any ranks."""
    for index, (name, parameter) in enumerate(engine.parameters.items()):
        part, state = engine.parts[name], engine.optimizer.state[parameter]
        state.update(engine.optimizer._new_state(parameter, engine.optimizer.param_groups[0]))  # type: ignore[attr-defined]
        state["step"] = torch.tensor(7.0)
        generator = torch.Generator().manual_seed(index)
        for key in ("row", "column", "variance"):
            if key in state:
                rows = key != "column"
                shape = part.whole[:1] if rows else (part.whole[1],)
                whole = torch.rand(shape, generator=generator)
                state[key] = cut(whole, rows_of(shape, engine.shards, engine.shard_rank)) if rows else whole


def save(engine: CutEngine, folder: Path) -> Path:
    tensors, parts = own_states(engine)  # type: ignore[arg-type]
    name = file_name(OPTIMIZER, engine.shard_rank, engine.shards)
    files = {name: tensors} if engine.writes else {}
    return CheckpointStore(folder, world=engine.world).save(1, files, {}, {name: parts})


def load(engine: CutEngine, folder: Path, was: str | None = None) -> None:
    used = was or state_format(engine)  # type: ignore[arg-type]
    load_optimizer(engine, StoredTensors(folder, OPTIMIZER), {}, used)  # type: ignore[arg-type]


def states(engine: CutEngine) -> dict[str, Tensor]:
    return optimizer_state(engine)[0]  # type: ignore[arg-type]


def whole_states(engines: list[CutEngine]) -> dict[str, Tensor]:
    """Return the states of plain numbers that ranks have between them."""
    found = [states(engine) for engine in engines[: engines[0].shards]]
    named = {name: [mine[name] for mine in found] for name in found[0]}
    return {
        name: tensors[0] if not tensors[0].ndim or name.endswith("column") else torch.cat(tensors)
        for name, tensors in named.items()
    }


def through_layouts(tmp_path: Path, start: Any, name: str, **formats: str) -> list[list[CutEngine]]:
    """Return the engines of each layout: each loads what the one before it saved."""
    stages: list[list[CutEngine]] = []
    for index, size in enumerate(LAYOUTS):

        def work(world: World, index: int = index) -> CutEngine:
            engine = engine_on(world, name, seed=index, **formats)
            if index == 0:
                start(engine)
            else:
                load(engine, tmp_path / str(index - 1) / "step-00000001")
            save(engine, tmp_path / str(index))
            return engine

        stages.append(succeeded(on_ranks(size, work)))
    return stages


@pytest.mark.parametrize("state", ["fp32", "bf16"])
def test_adamw_on_any_ranks_has_no_bit_changed(tmp_path: Path, state: str) -> None:
    stages = through_layouts(tmp_path, partial(step, seed=1), "adamw", state=state)
    first = whole_states(stages[0])
    assert len(first) == 9
    assert all(bool(tensor.any()) for tensor in first.values())
    for engines in stages[1:]:
        found = whole_states(engines)
        assert found.keys() == first.keys()
        assert all(torch.equal(found[name], tensor) for name, tensor in first.items())


def test_remainders_and_torch_sgd_likewise(tmp_path: Path) -> None:
    for name, formats in (("adamw", {"master_weights": "split24"}), ("sgd", {})):
        stages = through_layouts(tmp_path / name, partial(step, seed=1), name, **formats)
        first = whole_states(stages[0])
        assert any(key.endswith((".remainder", ".momentum_buffer")) for key in first)
        for engines in stages[1:]:
            found = whole_states(engines)
            assert all(torch.equal(found[key], tensor) for key, tensor in first.items())


def test_rows_are_cut_and_columns_are_whole(tmp_path: Path) -> None:
    stages = through_layouts(tmp_path, fill, "adafactor")
    first = whole_states(stages[0])
    assert {name.rpartition(".")[2] for name in first} == {"step", "row", "column", "variance"}
    for engines in stages[1:]:
        assert all(states(engine).keys() == first.keys() for engine in engines)
        found = whole_states(engines)
        assert all(torch.equal(found[name], tensor) for name, tensor in first.items())
        columns = [states(engine)["wide.weight.column"] for engine in engines]
        assert all(torch.equal(column, first["wide.weight.column"]) for column in columns)


@pytest.mark.parametrize("state", ["8bit", "4bit"])
@pytest.mark.parametrize("name", ["adamw", "lamb", "muon"])
def test_blocks_that_are_rows_are_never_rounded(
    tmp_path: Path, name: str, state: str, capsys: pytest.CaptureFixture[str]
) -> None:
    def stepped(engine: CutEngine) -> None:
        for parameter in engine.parameters.values():
            group = next(g for g in engine.optimizer.param_groups if any(p is parameter for p in g["params"]))
            made = engine.optimizer._state_of(parameter, group)  # type: ignore[attr-defined]
            for tensor in (t for key, t in made.items() if key != "step"):
                tensor.copy_(torch.randint(1, 100, tensor.shape).to(tensor.dtype))

    stages = through_layouts(tmp_path, stepped, name, state=state)
    first, again = stages[0], stages[3]
    for one, other in zip(first, again, strict=True):
        mine, found = states(one), states(other)
        assert mine.keys() == found.keys()
        assert all(torch.equal(found[key], tensor) for key, tensor in mine.items())
    assert any(key.endswith("_scale") for key in states(first[0]))
    assert "rounded anew" not in capsys.readouterr().err


def test_what_had_to_be_rounded_is_said_once(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    def odd(world: World) -> CutEngine:
        return cut_engine(nn.Linear(100, 120), partial(build, "adamw", state="8bit"), world)

    alone = odd(ALONE)
    step(alone, 1)
    folder = save(alone, tmp_path)
    succeeded(on_ranks(2, lambda world: load(odd(world), folder)))
    told = capsys.readouterr().err
    assert told == f"{folder}: 2 moments were rounded anew: 8bit states of 1 shards to 8bit states of 2\n"
    load(odd(ALONE), folder)
    assert capsys.readouterr().err == ""


def test_replicas_read_and_only_the_first_of_them_writes(tmp_path: Path) -> None:
    def work(world: World) -> CutEngine:
        engine = engine_on(world, "adamw", shards=2)
        step(engine, 1)
        save(engine, tmp_path)
        fresh = engine_on(world, "adamw", seed=9, shards=2)
        load(fresh, tmp_path / "step-00000001")
        assert all(torch.equal(states(fresh)[name], tensor) for name, tensor in states(engine).items())
        return fresh

    engines = succeeded(on_ranks(4, work))
    assert [engine.writes for engine in engines] == [True, True, False, False]
    assert len(list((tmp_path / "step-00000001").glob("optimizer-*-of-00002.safetensors"))) == 2


def test_step_counts_are_written_once(tmp_path: Path) -> None:
    def work(world: World) -> CutEngine:
        engine = engine_on(world, "adamw")
        step(engine, 1)
        return engine

    engines = succeeded(on_ranks(3, work))
    written = [own_states(engine)[0] for engine in engines]
    assert ["wide.bias.step" in mine for mine in written] == [True, False, False]
    assert all("short.weight.exp_avg" in mine for mine in written)


def test_a_state_that_cannot_be_cut_is_refused_where_there_are_shards(tmp_path: Path) -> None:
    def work(world: World) -> Any:
        engine = engine_on(world, "sgd")
        step(engine, 1)
        engine.optimizer.state[engine.parameters["wide.weight"]]["odd"] = torch.zeros(3)
        return own_states(engine)  # type: ignore[arg-type]

    assert "wide.weight.odd" in succeeded(on_ranks(1, work))[0][0]
    assert all(isinstance(error, CheckpointError) for error in on_ranks(2, work))


def test_one_rank_takes_any_state_of_any_optimizer_as_it_is(tmp_path: Path) -> None:
    engine = engine_on(ALONE, "sgd")
    step(engine, 1)
    engine.optimizer.state[engine.parameters["wide.weight"]]["odd"] = torch.arange(3)
    other = engine_on(ALONE, "sgd", seed=5)
    load(other, save(engine, tmp_path))
    assert torch.equal(other.optimizer.state[other.parameters["wide.weight"]]["odd"], torch.arange(3))


def test_another_format_is_taken_over(tmp_path: Path) -> None:
    engine = engine_on(ALONE, "adamw", state="8bit")
    step(engine, 1)
    other = engine_on(ALONE, "adamw", state="fp32")
    load(other, save(engine, tmp_path), "8bit")
    moments = states(other)
    assert moments["wide.weight.exp_avg"].dtype == torch.float32
    assert not any(name.endswith("_scale") for name in moments)
    step(other, 2)
