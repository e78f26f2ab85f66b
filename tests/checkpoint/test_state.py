"""The state of a run: saved, restored bitwise, refused for another model."""

from __future__ import annotations

import json
import threading
from collections.abc import Iterable
from functools import partial
from pathlib import Path
from typing import Any

import pytest
import torch
from group import RANK, run_group
from ranks_apart import Position, cut_engine, on_ranks, step, succeeded
from torch import Tensor, nn

from bigtrain.amp.loss_scale import LossScale
from bigtrain.amp.precision import apply
from bigtrain.checkpoint import tensors
from bigtrain.checkpoint.state import OPTIMIZER, STATE, WEIGHTS, TrainState, load_weights, optimizer_state, weights
from bigtrain.checkpoint.store import CheckpointStore
from bigtrain.checkpoint.stored import StoredTensors
from bigtrain.engine import Engine
from bigtrain.errors import CheckpointError
from bigtrain.optim import AdamW, Lamb
from bigtrain.optim.offload import keep_on_host
from bigtrain.optim.release import release
from bigtrain.world import ALONE, World


class Tied(nn.Module):
    def __init__(self, width: int = 6) -> None:
        super().__init__()
        self.embedding = nn.Embedding(10, width)
        self.head = nn.Linear(width, 10)
        self.head.weight = self.embedding.weight
        self.register_buffer("scale", torch.ones(3))
        self.register_buffer("derived", torch.ones(3), persistent=False)

    def forward(self, ids: Tensor) -> Tensor:
        return self.head(self.embedding(ids)).square().mean()


OPTIMIZERS = {
    "adamw": partial(torch.optim.AdamW, lr=0.1),
    "fused": partial(torch.optim.AdamW, lr=0.1, fused=True),
    "lamb": partial(Lamb, lr=0.1),
    "sgd": partial(torch.optim.SGD, lr=0.1, momentum=0.9),
    "own": partial(AdamW, lr=0.1, state="8bit"),
}


COUNTS: dict[str, Any] = {
    "step": 1,
    "tokens": 4,
    "loader": {"row": 1, "corpus": "none"},
    "loss_scale": {"scale": 1.0, "good_steps": 0},
    "optimizer_class": "AdamW",
    "optimizer": {},
}
"""What the first checkpoints said, of one step."""


def state_of(
    optimizer: str = "adamw", *, width: int = 6, seed: int = 0, precision: str = "fp32", released: bool = False
) -> TrainState:
    torch.manual_seed(seed)
    model = Tied(width)
    if optimizer == "lean":
        apply(model, "bf16", master_weights="split24")
        built: Any = AdamW(model.parameters(), lr=1e-3, state="8bit", master_weights="split24")
    else:
        built = OPTIMIZERS[optimizer](model.parameters())
    for group in built.param_groups:
        group["initial_lr"] = group["lr"]
    engine = Engine(
        model,
        built,
        micro_batch_size=4,
        shifted_labels=False,
        schedule=lambda _: 1.0,
        loss_scale=LossScale("cpu", precision=precision),
        release=release(model.parameters(), built) if released else None,
    )
    return TrainState(engine, Position())  # type: ignore[arg-type]


def take(state: TrainState, steps: Iterable[int], max_norm: float | None = 1.0) -> None:
    for number in steps:
        ids = torch.arange(4) + number % 5
        for micro in state.engine.micro_batches({"ids": ids}):
            state.engine.backward(state.engine.model(**micro))
        state.engine.step(max_norm)
        state.loader.position += 1
        state.tokens += 4


def save(state: TrainState, folder: Path) -> Path:
    return state.save(CheckpointStore(folder), {"plan.yaml": "a plan"})


def bits(state: TrainState) -> list[Tensor]:
    moments, _ = optimizer_state(state.engine)
    return [*dict(weights(state.engine.model)).values(), *moments.values()]


@pytest.mark.parametrize("optimizer", OPTIMIZERS)
def test_restored_and_gone_on_is_bitwise_the_run_left_alone(tmp_path: Path, optimizer: str) -> None:
    whole, cut = state_of(optimizer), state_of(optimizer)
    take(whole, range(7))
    take(cut, range(3))
    folder = save(cut, tmp_path)
    resumed = state_of(optimizer, seed=99)
    resumed.restore(folder)
    assert (resumed.step, resumed.tokens, resumed.loader.position) == (3, 12, 3)
    assert all(torch.equal(one, other) for one, other in zip(bits(resumed), bits(cut), strict=True))
    take(resumed, range(3, 7))
    assert all(torch.equal(one, other) for one, other in zip(bits(resumed), bits(whole), strict=True))


def test_tied_weights_are_stored_once_and_buffers_that_are_derived_not_at_all(tmp_path: Path) -> None:
    folder = save(state_of(), tmp_path)
    assert set(tensors.read_header(folder / WEIGHTS)) == {"embedding.weight", "head.bias", "scale"}
    assert (folder / "plan.yaml").read_text() == "a plan"
    assert (folder / STATE).is_file()


def test_what_the_loop_remembers_is_restored(tmp_path: Path) -> None:
    state = state_of()
    state.notes["skips"] = {"total": 5, "in_a_row": 2}
    folder = save(state, tmp_path)
    again = state_of()
    again.notes["other"] = 1
    again.restore(folder)
    assert again.notes == {"skips": {"total": 5, "in_a_row": 2}}
    counts = json.loads((folder / STATE).read_text())
    del counts["notes"]  # of a checkpoint from before there were any
    files = {name: dict(tensors.read_tensors(folder / name)) for name in (WEIGHTS, OPTIMIZER)}
    older = CheckpointStore(tmp_path / "older").save(0, files, {STATE: json.dumps(counts)})
    again.restore(older)
    assert again.notes == {}


@pytest.mark.parametrize("optimizer", ["adamw", "own"])
def test_going_back_in_a_run_is_as_if_the_steps_had_not_been(tmp_path: Path, optimizer: str) -> None:
    state, expected = state_of(optimizer, width=512), state_of(optimizer, width=512)
    folders = [save(state, tmp_path)]
    take(state, range(2))
    folders.append(save(state, tmp_path))
    for folder, steps in zip(folders, (0, 2), strict=True):
        take(state, range(2, 5))
        state.restore(folder)
        assert (state.step, state.tokens) == (steps, 4 * steps)
        take(state, range(steps, 4))
        if not steps:
            take(expected, range(4))
        assert all(torch.equal(one, other) for one, other in zip(bits(state), bits(expected), strict=True))


def test_before_the_first_step_there_are_no_states(tmp_path: Path) -> None:
    folder = save(state_of(), tmp_path)
    assert tensors.read_header(folder / OPTIMIZER) == {}
    state = state_of()
    state.restore(folder)
    assert state.step == 0


def test_loading_keeps_tied_weights_tied(tmp_path: Path) -> None:
    folder = save(state_of(seed=1), tmp_path)
    model = Tied()
    load_weights(model, folder)
    assert model.head.weight is model.embedding.weight
    assert torch.equal(model.head.weight, state_of(seed=1).engine.model.get_parameter("embedding.weight"))


def test_another_shape_is_refused_and_nothing_is_changed(tmp_path: Path) -> None:
    folder = save(state_of(), tmp_path)
    other = state_of(width=8)
    before = [tensor.clone() for tensor in bits(other)]
    with pytest.raises(CheckpointError, match=r"embedding.weight is \(10, 6\), in the model \(10, 8\)"):
        other.restore(folder)
    assert all(torch.equal(one, old) for one, old in zip(bits(other), before, strict=True))


def test_another_model_is_refused_with_the_first_three_differences(tmp_path: Path) -> None:
    folder = save(state_of(), tmp_path)
    with pytest.raises(CheckpointError) as caught:
        load_weights(nn.Sequential(nn.Linear(2, 2), nn.Linear(2, 2)), folder)
    assert str(caught.value).endswith("0.weight is absent; 0.bias is absent; 1.weight is absent")


def test_a_state_of_an_unknown_parameter_is_refused(tmp_path: Path) -> None:
    state = state_of()
    take(state, range(1))
    moments, counters = optimizer_state(state.engine)
    moments["elsewhere.exp_avg"] = torch.zeros(1)
    folder = CheckpointStore(tmp_path).save(
        1,
        {WEIGHTS: dict(weights(state.engine.model)), OPTIMIZER: moments},
        {STATE: json.dumps(COUNTS | {"optimizer": counters})},
    )
    assert counters == {}
    with pytest.raises(CheckpointError, match="a state of 'elsewhere', which is not in the model"):
        state_of().restore(folder)


def test_states_of_another_optimizer_are_refused(tmp_path: Path) -> None:
    state = state_of("adamw")
    take(state, range(1))
    folder = save(state, tmp_path)
    with pytest.raises(CheckpointError, match="its optimizer states are of AdamW, not of Lamb; start a new run with"):
        state_of("lamb").restore(folder)


def test_the_loss_scale_is_restored_to_the_bit(tmp_path: Path) -> None:
    state = state_of(precision="fp16")
    take(state, range(2))
    for micro in state.engine.micro_batches({"ids": torch.arange(4)}):
        state.engine.backward(state.engine.model(**micro) * 1e36)
    assert state.engine.step().skipped
    take(state, range(3, 6))
    folder = save(state, tmp_path)
    before = state.engine.loss_scale.state_dict()
    assert before == {"scale": 2.0**15, "good_steps": 3}
    other = state_of(precision="fp16", seed=99)
    other.restore(folder)
    assert other.engine.loss_scale.state_dict() == before
    assert other.step == 6
    take(state, range(6, 9))
    take(other, range(6, 9))
    assert other.engine.loss_scale.state_dict() == state.engine.loss_scale.state_dict() != before
    assert all(torch.equal(one, mine) for one, mine in zip(bits(other), bits(state), strict=True))


@pytest.mark.parametrize("released", [False, True])
def test_weights_in_24_bits_and_moments_in_8_are_restored_to_the_bit(tmp_path: Path, released: bool) -> None:
    whole, cut = state_of("lean", width=512, released=released), state_of("lean", width=512, released=released)
    max_norm = None if released else 1.0
    take(whole, range(7), max_norm)
    take(cut, range(3), max_norm)
    folder = save(cut, tmp_path)
    assert tensors.read_header(folder / WEIGHTS)["embedding.weight"].dtype == torch.bfloat16
    assert "embedding.weight.remainder" in tensors.read_header(folder / OPTIMIZER)
    resumed = state_of("lean", width=512, seed=99, released=released)
    resumed.restore(folder)
    assert all(torch.equal(one, other) for one, other in zip(bits(resumed), bits(cut), strict=True))
    take(resumed, range(3, 7), max_norm)
    assert all(torch.equal(one, other) for one, other in zip(bits(resumed), bits(whole), strict=True))


DRAWING = threading.Lock()
"""Ranks that are threads share one generator."""


def cut_state(world: World, seed: int = 0, width: int = 6) -> TrainState:
    with DRAWING:
        torch.manual_seed(seed)
        model = Tied(width)
    model.scale.fill_(float(seed))
    engine = cut_engine(model, lambda held: AdamW(held, lr=0.1), world)
    return TrainState(engine, Position())  # type: ignore[arg-type]


def save_on(world: World, state: TrainState, folder: Path) -> Path:
    return state.save(CheckpointStore(folder, world=world), {"plan.yaml": "a plan"})


def stored(folder: Path) -> dict[str, Tensor]:
    """Return all weights and states of a checkpoint, whole."""
    return {name: tensor for kind in (WEIGHTS, OPTIMIZER) for name, tensor in StoredTensors(folder, kind).whole()}


def test_a_run_goes_from_ranks_to_ranks_and_no_bit_is_changed(tmp_path: Path) -> None:
    folders: list[Path] = []
    for index, size in enumerate((4, 2, 1, 4, 3)):

        def work(world: World, index: int = index) -> Path:
            state = cut_state(world, seed=index)
            if index == 0:
                step(state.engine, 1)  # type: ignore[arg-type]
                state.tokens, state.loader.position = 77, 5  # type: ignore[attr-defined]
            else:
                state.restore(folders[-1])
            assert (state.step, state.tokens, state.loader.position) == (1, 77, 5)  # type: ignore[attr-defined]
            return save_on(world, state, tmp_path / str(index))

        (folder,) = set(succeeded(on_ranks(size, work)))
        folders.append(folder)
        files = {file.name for file in folder.iterdir()}
        assert len([name for name in files if name.startswith("weights")]) == size
        assert (WEIGHTS in files) == (size == 1)
    first = stored(folders[0])
    assert {"embedding.weight", "head.bias", "scale", "head.bias.exp_avg"} < first.keys()
    for folder in folders[1:]:
        found = stored(folder)
        assert found.keys() == first.keys()
        assert all(torch.equal(found[name], tensor) for name, tensor in first.items())
        assert json.loads((folder / STATE).read_text()) == json.loads((folders[0] / STATE).read_text())


def test_one_rank_writes_what_it_wrote_before_there_were_several(tmp_path: Path) -> None:
    folder = save_on(ALONE, cut_state(ALONE), tmp_path)
    raw = (folder / WEIGHTS).read_bytes()
    header = json.loads(raw[8 : 8 + int.from_bytes(raw[:8], "little")])
    assert list(header) == ["scale", "embedding.weight", "head.bias"]
    assert "__metadata__" not in header


def test_a_checkpoint_that_does_not_tell_its_format_has_the_optimizers(tmp_path: Path) -> None:
    state = state_of("own", width=512)
    take(state, range(1))
    moments, _ = optimizer_state(state.engine)
    files = {WEIGHTS: dict(weights(state.engine.model)), OPTIMIZER: moments}
    folder = CheckpointStore(tmp_path).save(1, files, {STATE: json.dumps(COUNTS)})
    resumed = state_of("own", width=512, seed=9)
    resumed.restore(folder)
    assert all(torch.equal(one, other) for one, other in zip(bits(resumed), bits(state), strict=True))
    assert any(name.endswith("_scale") for name in moments)


def test_weights_of_ranks_go_into_a_whole_model(tmp_path: Path) -> None:
    succeeded(on_ranks(3, lambda world: save_on(world, cut_state(world, seed=3), tmp_path)))
    model = Tied()
    load_weights(model, tmp_path / "step-00000000")
    expected = cut_state(ALONE, seed=3).engine.model
    assert all(torch.equal(one, other) for one, other in zip(model.parameters(), expected.parameters(), strict=True))
    assert model.head.weight is model.embedding.weight
    assert torch.equal(model.scale, torch.full((3,), 3.0))


def test_a_new_run_on_ranks_starts_from_weights_of_one(tmp_path: Path) -> None:
    folder = save(state_of(seed=4), tmp_path)

    def work(world: World) -> TrainState:
        state = cut_state(world)
        state.load_weights(folder)
        return state

    states = succeeded(on_ranks(3, work))
    rows = [state.engine.parameters["embedding.weight"].detach() for state in states]
    assert torch.equal(torch.cat(rows), state_of(seed=4).engine.parameters["embedding.weight"])
    assert all(state.step == 0 and not state.engine.optimizer.state for state in states)


def test_another_shape_is_refused_on_all_ranks(tmp_path: Path) -> None:
    succeeded(on_ranks(2, lambda world: save_on(world, cut_state(world), tmp_path)))
    folder = tmp_path / "step-00000000"
    found = on_ranks(3, lambda world: cut_state(world, width=8).restore(folder))
    assert all(isinstance(error, CheckpointError) for error in found)
    assert all("embedding.weight is (10, 6), in the model (10, 8)" in str(error) for error in found)


def offloaded(world: World, seed: int, dtype: torch.dtype | None) -> TrainState:
    state = cut_state(world, seed=seed)
    keep_on_host(state.engine.optimizer, torch.device("cpu"), dtype=dtype)
    return state


def test_masters_on_the_host_are_the_weights_and_offload_may_change(tmp_path: Path) -> None:
    def first(world: World) -> Path:
        state = offloaded(world, 1, torch.bfloat16)
        assert state.engine.parameters["head.bias"].dtype == torch.bfloat16
        step(state.engine, 1)  # type: ignore[arg-type]
        return save_on(world, state, tmp_path / "0")

    (folder,) = set(succeeded(on_ranks(2, first)))
    kept = stored(folder)
    assert kept["embedding.weight"].dtype == torch.float32
    assert not any(name.endswith(".master") for name in kept)

    def again(world: World) -> Path:
        state = offloaded(world, 2, torch.bfloat16)
        state.restore(folder)
        engine = state.engine
        for parameter in engine.parameters.values():
            held = engine.optimizer.state[parameter]
            assert torch.equal(parameter, held["master"].bfloat16())
            assert {"master", "step", "exp_avg", "exp_avg_sq"} == held.keys()
        return save_on(world, state, tmp_path / "1")

    def without(world: World) -> Path:
        state = cut_state(world, seed=3)
        state.restore(folder)
        return save_on(world, state, tmp_path / "2")

    for size, work in ((3, again), (1, without)):
        (later,) = set(succeeded(on_ranks(size, work)))
        found = stored(later)
        assert found.keys() == kept.keys()
        assert all(torch.equal(found[name], tensor) for name, tensor in kept.items())


RANKS = Path(__file__).parent / "rank_saves.py"


def run_ranks(folder: Path) -> list[tuple[int, list[dict[str, Any]]]]:
    """Return exit code and findings of each of four processes, of which the last kills itself."""
    ranks = run_group([RANKS, RANK, folder / "store", folder], 4)
    assert all(rank.code in (0, -9) for rank in ranks), ranks
    return [(rank.code, rank.told) for rank in ranks]


@pytest.fixture(scope="module")
def four(tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, list[tuple[int, list[dict[str, Any]]]]]:
    folder = tmp_path_factory.mktemp("four")
    return folder, run_ranks(folder)


@pytest.mark.slow
def test_what_fully_shard_cuts_goes_through_meshes_and_on_bit_by_bit(four: Any) -> None:
    folder, ranks = four
    for _, (found, *_) in ranks:
        assert found["same"]
        assert found["later"]
        assert "embedding.weight" in found["names"]
        assert "head.weight" not in found["names"]
    names = [sorted(file.name for file in (folder / str(i) / "step-00000002").glob("weights*")) for i in range(4)]
    assert [len(files) for files in names] == [4, 2, 1, 4]
    first = dict(StoredTensors(folder / "0" / "step-00000002", WEIGHTS).whole())
    for index in (1, 2, 3):
        found = dict(StoredTensors(folder / str(index) / "step-00000002", WEIGHTS).whole())
        assert found.keys() == first.keys()
        assert all(torch.equal(found[name], tensor) for name, tensor in first.items())
    pairs = zip(*(sorted((folder / str(i) / "step-00000002").glob("*.safetensors")) for i in (0, 3)), strict=True)
    assert all(one.read_bytes() == other.read_bytes() for one, other in pairs)


@pytest.mark.slow
def test_a_rank_that_is_killed_while_it_writes_leaves_the_last_checkpoint(four: Any) -> None:
    folder, ranks = four
    assert [code for code, _ in ranks] == [0, 0, 0, -9]
    assert all("noticed" in found[-1] for _, found in ranks[:3])
    assert [file.name for file in (folder / "killed").iterdir()] == ["step-00000001"]
    assert CheckpointStore(folder / "killed").newest() == folder / "killed" / "step-00000001"
