"""A model's step through a prepared engine, on fake tensors, against the engine's real one."""

from __future__ import annotations

import copy
from functools import partial
from typing import Any

import pytest
import torch
from torch import Tensor, nn

from bigtrain.engine import prepare
from bigtrain.errors import InputError
from bigtrain.memory.attribute import causes_at_peak
from bigtrain.memory.predict import SECOND_STEP
from bigtrain.memory.record import Recording
from bigtrain.memory.report import MemoryReport
from bigtrain.model_step import Subject, check_sample, factory_of
from bigtrain.planner.choice import Choice
from bigtrain.planner.clock import Flops
from bigtrain.planner.hardware import cpu
from bigtrain.planner.module_plan import ModulePlan, Undescribed, module_recipe
from bigtrain.planner.speed import StepSeconds
from tests.shared.beside_blocks import measure_beside_blocks

ADAMW = partial(torch.optim.AdamW, fused=True)


class Encoder(nn.Module):
    """torch's own encoder with a head."""

    def __init__(self) -> None:
        super().__init__()
        layer = nn.TransformerEncoderLayer(32, 4, 64, dropout=0.1, batch_first=True)
        self.encoder = nn.TransformerEncoder(layer, 2, enable_nested_tensor=False)
        self.head = nn.Linear(32, 5)

    def forward(self, x: Tensor, labels: Tensor) -> Tensor:
        return nn.functional.cross_entropy(self.head(self.encoder(x).mean(1)), labels)


def sample(rows: int = 4) -> dict[str, Tensor]:
    return {"x": torch.randn(rows, 12, 32), "labels": torch.zeros(rows, dtype=torch.long)}


def plan_of(choice: Choice, precision: str = "fp32") -> ModulePlan:
    hardware = cpu()
    recipe = module_recipe(
        "Encoder",
        hardware,
        global_batch_size=choice.micro_batch_size * choice.accumulation_steps,
        budget_bytes=2**40,
        precision=precision,
        seed=0,
        causal=False,
        optimizer="adamw",
        learning_rate=1e-3,
    )
    return ModulePlan(
        recipe=choice.into(recipe),
        model=Undescribed("Encoder"),  # type: ignore[arg-type]
        hardware=hardware,
        world_size=1,
        choice=choice,
        memory=MemoryReport({}),
        seconds=StepSeconds(1.0, 1.0, 0.0, 0.0),
        parameters=1,
        flops_per_token=1,
        mfu=0.0,
        rates_source="",
    )


def peak_of(recording: Recording) -> dict[str, int]:
    return causes_at_peak(recording, SECOND_STEP)


def measured_bytes(plan: ModulePlan) -> int:
    """Return the peak of the second step of an engine, everything counted."""
    data = sample(plan.recipe.train.global_batch_size)
    engine = prepare(Encoder(), plan, ADAMW)

    def step() -> None:
        for micro in engine.micro_batches(data):
            engine.backward(engine.model(**micro))
        engine.step()

    step()
    states = [value for state in engine.optimizer.state.values() for value in state.values()]
    held = [*engine.model.parameters(), *engine.model.buffers(), *states]
    return sum(tensor.nbytes for tensor in held) + measure_beside_blocks(step).peak_bytes


@pytest.mark.parametrize("precision", ["fp32", "bf16"])
@pytest.mark.parametrize("choice", [Choice(4, 1, ("none",) * 2), Choice(2, 2, ("full", "selective"))])
def test_a_traced_step_holds_what_a_real_one_does(choice: Choice, precision: str) -> None:
    plan = plan_of(choice, precision)
    traced = sum(peak_of(Subject(Encoder(), sample(1), ADAMW).step(plan)).values())
    assert traced == pytest.approx(measured_bytes(plan), rel=5e-3)


def test_a_sample_of_any_number_of_rows_makes_a_micro_batch() -> None:
    plan = plan_of(Choice(4, 1, ("none",) * 2))
    peaks = [peak_of(Subject(Encoder(), sample(rows), ADAMW).step(plan)) for rows in (1, 4, 7)]
    assert peaks[0] == peaks[1] == peaks[2]


def test_parts_have_flops_of_the_rows() -> None:
    subject = Subject(Encoder(), sample(1), ADAMW)
    two, four = (sum(subject.trace(rows, "fp32", Flops(), ("none",)).seconds(("none",) * 2)) for rows in (2, 4))
    assert four == pytest.approx(2 * two)


def test_names_of_blocks_and_optimizer() -> None:
    subject = Subject(Encoder(), sample(1), ADAMW)
    assert subject.name == "Encoder" and subject.block_names == ["encoder.layers.0", "encoder.layers.1"]
    assert subject.optimizer_name_and_rate() == ("adamw", 1e-3)


@pytest.mark.parametrize(
    ("given", "tokens"),
    [
        ({"input_ids": torch.zeros(2, 7)}, 7),
        ({"x": torch.zeros(2, 9), "labels": torch.zeros(2, 3)}, 3),
        ({"x": torch.zeros(2, 9)}, 1),
    ],
)
def test_tokens_of_a_row(given: dict[str, Tensor], tokens: int) -> None:
    assert Subject(nn.Linear(1, 1), given, ADAMW).row_tokens == tokens


def test_factories_go_by_name() -> None:
    assert factory_of("adamw") is torch.optim.AdamW and factory_of("sgd") is torch.optim.SGD
    assert factory_of(ADAMW) is ADAMW
    with pytest.raises(InputError, match="'adamm' is no optimizer of torch.optim; did you mean"):
        factory_of("adamm")


@pytest.mark.parametrize(
    ("given", "text"),
    [
        ([torch.zeros(2)], "sample: a list is no batch"),
        ({"x": 3}, "sample: holds no tensor with rows"),
        ({"x": torch.zeros(2, 3), "y": torch.zeros(3)}, r"different numbers of rows \(x 2, y 3\)"),
    ],
)
def test_a_sample_that_is_no_batch(given: Any, text: str) -> None:
    with pytest.raises(InputError, match=text):
        check_sample(given)


def test_a_model_is_left_alone() -> None:
    model = Encoder()
    before = copy.deepcopy(model.state_dict())
    Subject(model, sample(1), ADAMW).step(plan_of(Choice(2, 1, ("full",) * 2)))
    assert all(torch.equal(before[name], value) for name, value in model.state_dict().items())
