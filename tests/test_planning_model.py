"""plan_model and the loop that its plan is for: any module, from the meta device on, with a plain loop's losses."""

from __future__ import annotations

from collections.abc import Callable
from functools import partial
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch.nn import functional

import bigtrain
from bigtrain.errors import DoesNotFit, InputError
from bigtrain.planner.price import PROCESS_BYTES
from bigtrain.units import exact_bytes

ROWS, LENGTH, WIDTH, CLASSES, WORDS = 8, 6, 16, 5, 64


class Block(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.norm, self.up, self.down = nn.LayerNorm(WIDTH), nn.Linear(WIDTH, 64), nn.Linear(64, WIDTH)

    def forward(self, x: Tensor) -> Tensor:
        return x + self.down(functional.gelu(self.up(self.norm(x))))


class Net(nn.Module):
    def __init__(self, block: type[nn.Module] = Block) -> None:
        super().__init__()
        self.blocks = nn.ModuleList(block() for _ in range(3))
        self.head = nn.Linear(WIDTH, CLASSES)

    def forward(self, x: Tensor, labels: Tensor) -> Tensor:
        for block in self.blocks:
            x = block(x)
        return functional.cross_entropy(self.head(x.mean(1)), labels)


def batch(rows: int = ROWS) -> dict[str, Tensor]:
    torch.manual_seed(1)
    return {"x": torch.randn(rows, LENGTH, WIDTH), "labels": torch.randint(0, CLASSES, (rows,))}


def words(rows: int = ROWS) -> dict[str, Tensor]:
    torch.manual_seed(2)
    ids = torch.randint(0, WORDS, (rows, LENGTH))
    return {"input_ids": ids, "labels": ids, "attention_mask": torch.ones_like(ids)}


def gpt() -> nn.Module:
    import transformers

    config = transformers.GPT2Config(
        vocab_size=WORDS, n_embd=WIDTH, n_layer=2, n_head=2, n_positions=LENGTH, use_cache=False, bos_token_id=0,
        eos_token_id=0, resid_pdrop=0.0, embd_pdrop=0.0, attn_pdrop=0.0,
    )  # fmt: skip
    config.loss_type = "ForCausalLM"  # its name, which transformers looks for, and would warn about
    return transformers.GPT2LMHeadModel(config)


def bert() -> nn.Module:
    import transformers

    config = transformers.BertConfig(
        vocab_size=WORDS, hidden_size=WIDTH, num_hidden_layers=2, num_attention_heads=2, intermediate_size=32,
        hidden_dropout_prob=0.0, attention_probs_dropout_prob=0.0,
    )  # fmt: skip
    return transformers.BertForMaskedLM(config)


def budget_between(*plans: bigtrain.Plan) -> str:
    """Return a budget halfway between what two plans need."""
    least, most = sorted(plan.memory.device_bytes_peak or 0 for plan in plans)
    assert 0 < least < most
    return exact_bytes((least + most) // 2)


def losses_of(engine: bigtrain.Engine, data: dict[str, Tensor], steps: int = 3) -> list[float]:
    losses = []
    for _ in range(steps):
        for micro in engine.micro_batches(data):
            engine.backward(engine.model(**micro))
        losses.append(float(engine.step().loss))
    return losses


SGD = partial(torch.optim.SGD, lr=0.1)


@pytest.mark.parametrize(
    ("make", "data"),
    [
        (Net, batch),
        pytest.param(gpt, words, marks=pytest.mark.slow),
        pytest.param(bert, words, marks=pytest.mark.slow),
    ],
)
def test_the_loop_runs_as_planned_with_the_losses_of_one_that_is_not(
    make: Callable[[], nn.Module], data: Callable[[], dict[str, Tensor]]
) -> None:
    options: dict[str, Any] = {"global_batch_size": ROWS, "optimizer": SGD, "device": "cpu", "causal": make is gpt}
    sample = {name: value[:2] for name, value in data().items()}
    with torch.device("meta"):
        model, plain = make(), make()
    free = bigtrain.plan_model(model, sample, **options)
    assert free.choice.accumulation_steps == 1 and set(free.choice.recompute) == {"none"}
    least = bigtrain.plan_model(model, sample, micro_batch_size=1, recompute="full", **options)
    tight = budget_between(least, free)
    plan = bigtrain.plan_model(model, sample, memory_budget=tight, **options)
    assert plan.choice != free.choice and plan.memory.device_bytes_peak <= plan.budget_bytes
    engines = [bigtrain.prepare(m, p, SGD) for m, p in ((model, plan), (plain, free))]
    blocks = max((m for m in model.modules() if isinstance(m, nn.ModuleList)), key=len)
    applied = [vars(block)["_recompute"].policy if "_recompute" in vars(block) else "none" for block in blocks]
    assert applied == list(plan.choice.recompute)
    planned, unplanned = (losses_of(engine, data()) for engine in engines)
    assert planned == pytest.approx(unplanned, rel=1e-5) and planned[-1] < planned[0]


def test_nothing_of_the_model_changes() -> None:
    model = Net()
    before = {name: value.clone() for name, value in model.state_dict().items()}
    bigtrain.plan_model(model, batch(2), global_batch_size=4, device="cpu", micro_batch_size=4)
    assert all(torch.equal(value, before[name]) for name, value in model.state_dict().items())
    assert all(p.grad is None for p in model.parameters()) and not any("_recompute" in vars(b) for b in model.blocks)


def test_a_plan_tells_memory_speed_and_why_others_lost() -> None:
    plan = bigtrain.plan_model(Net(), batch(2), global_batch_size=ROWS, device="cpu-laptop", recompute="full")
    assert plan.choice.recompute == ("full",) * 3
    weights = sum(p.nbytes for p in Net().parameters())
    assert plan.memory.by_cause["weights"] == weights and plan.memory.device_bytes_peak > PROCESS_BYTES["cpu"]
    assert plan.parameters == weights // 4 and plan.row_tokens == 1 and plan.seconds.recompute_seconds > 0
    block = 2 * 2 * WIDTH * 64 * LENGTH
    assert plan.flops_per_token == 3 * (3 * block + 2 * WIDTH * CLASSES)
    assert 0 < plan.mfu < 1 and plan.rates_source == "table" and plan.recording is not None
    assert any("slower" in entry.reason for entry in plan.rejected)
    assert plan.as_object()["device"] == "cpu-laptop"


def test_a_cuda_device_of_the_table() -> None:
    plan = bigtrain.plan_model(
        Net(), batch(2), global_batch_size=4, device="h100", precision="bf16", micro_batch_size=2
    )
    memory = plan.memory
    assert (
        memory.reserved_bytes_peak >= memory.allocated_bytes_peak
        and memory.device_bytes_peak > memory.reserved_bytes_peak
    )
    assert plan.hardware.name == "h100" and plan.choice.accumulation_steps == 2


def test_ranks_share_states() -> None:
    options: dict[str, Any] = {"global_batch_size": 8, "device": "h100", "world_size": 4, "micro_batch_size": 2}
    plan = bigtrain.plan_model(Net(), batch(2), recompute="none", **options)
    assert plan.world_size == 4 and plan.choice.accumulation_steps == 1
    assert plan.choice.replicate in (1, 4) and plan.seconds.communication_seconds > 0
    asked = bigtrain.plan_model(Net(), batch(2), recompute="none", zero_stage=3, **options)
    assert asked.choice.zero_stage == 3 and asked.choice.replicate == 1


def test_a_budget_that_nothing_fits() -> None:
    with pytest.raises(DoesNotFit, match="Net: a memory budget of 1.00 MiB is .* less than the least it needs"):
        bigtrain.plan_model(Net(), batch(2), global_batch_size=2, memory_budget="1MiB", device="cpu")


class Reads(Block):
    def forward(self, x: Tensor) -> Tensor:
        return super().forward(x) * x.sum().item()


class Chooses(Block):
    def forward(self, x: Tensor) -> Tensor:
        return super().forward(x[x[:, 0, 0] > 0])


@pytest.mark.parametrize(("block", "operation"), [(Reads, "_local_scalar_dense"), (Chooses, "nonzero")])
def test_a_model_that_cannot_be_traced_is_refused(block: type[nn.Module], operation: str) -> None:
    with pytest.raises(InputError, match=rf"blocks\.0 \({block.__name__}\): aten\.{operation}"):
        bigtrain.plan_model(Net(block), batch(2), global_batch_size=2, device="cpu")


@pytest.mark.parametrize(
    ("options", "text"),
    [
        ({"precision": "bf61"}, "precision: 'bf61' is none of fp32, bf16, fp16; did you mean 'bf16'"),
        ({"memory_budget": "24"}, "memory_budget: .*24"),
        ({"micro_batch_size": 3}, "micro_batch_size: 3 does not divide a rank's 8 rows; use one of 1, 2, 4, 8"),
        ({"world_size": 3}, "global_batch_size: 8 rows do not divide into 3 ranks"),
        ({"optimizer": "adamv"}, "optimizer: 'adamv' is no optimizer of torch.optim; did you mean 'adam'"),
        ({"zero_stage": 4}, "zero_stage: 4 is no stage; use 0, 1, 2 or 3"),
        ({"recompute": "ful"}, "recompute.policy: 'ful' is none of"),
        ({"recompute": "offload"}, "recompute: 'offload' cannot be traced for a model of your own; use full"),
        ({"device": "h1000"}, "h1000"),
        ({"blocks": nn.Conv1d}, "Net: has no module of class Conv1d"),
        (
            {"forward": lambda model, sample: model.head(sample["x"])},
            r"Net: returns no scalar loss but a tensor \(\d, 6, 5\)",
        ),
    ],
)
def test_wrong_input_is_told(options: dict[str, Any], text: str) -> None:
    given = {"global_batch_size": 8, "device": "cpu", **options}
    with pytest.raises(InputError, match=text):
        bigtrain.plan_model(Net(), batch(2), **given)


def test_a_loss_outside_of_the_model() -> None:
    def forward(model: nn.Module, sample: dict[str, Tensor]) -> Tensor:
        return functional.mse_loss(model(sample["x"]), sample["y"])

    model = nn.Sequential(nn.Linear(4, 8), nn.Linear(8, 8), nn.Linear(8, 2))
    sample = {"x": torch.zeros(3, 4), "y": torch.zeros(3, 2)}
    plan = bigtrain.plan_model(
        model, sample, global_batch_size=4, device="cpu", forward=forward, blocks=[model[1]], micro_batch_size=4
    )
    assert plan.choice == plan.choice.__class__(4, 1, ("none",))


def test_what_makes_no_sense_is_refused_at_once() -> None:
    sample = {"x": torch.zeros(2, 4)}
    frozen = nn.Linear(4, 4).requires_grad_(False)
    with pytest.raises(InputError, match="Linear has no parameter to train; unfreeze some"):
        bigtrain.plan_model(frozen, sample, global_batch_size=2)
    for wrong, words in (
        ({"real": ["nothere"]}, "real: 'nothere' is not in the sample"),
        ({"memory_budget": 2**30}, "memory_budget: 1073741824 is no size; write a text such as '16GiB'"),
        ({"global_batch_size": 2.5}, "global_batch_size: 2.5 is no whole number of rows"),
    ):
        asked: Any = {"global_batch_size": 2, **wrong}
        with pytest.raises(InputError, match=words):
            bigtrain.plan_model(nn.Sequential(nn.ModuleList([nn.Linear(4, 4)])), sample, **asked)
