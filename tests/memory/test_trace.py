"""A trace on fake tensors against the profile of the same step on real ones: to a few bytes, on the CPU."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch._subclasses.fake_tensor import FakeTensor

from bigtrain import amp, recompute
from bigtrain.config.model import NORM_EPS, ModelConfig
from bigtrain.errors import InputError
from bigtrain.memory.measure import measure
from bigtrain.memory.trace import REAL_ELEMENTS, as_fake, fake_like, fakes, trace
from bigtrain.models.build import build_model
from bigtrain.optim.release import release
from tests.shared.beside_blocks import measure_beside_blocks

TOKENS, LENGTH, WORDS, WIDTH, LAYERS = 48, 12, 96, 32, 2
SLACK_BYTES = 32
"""Scalars that kernels hold for a moment."""
TOLERANCE = 1e-3


def own(family: str, dropout: float) -> tuple[nn.Module, dict[str, Any]]:
    config = ModelConfig(
        family=family,  # type: ignore[arg-type]
        vocab_size=WORDS,
        hidden_size=WIDTH,
        num_hidden_layers=LAYERS,
        num_attention_heads=4,
        num_key_value_heads=2 if family == "llama" else 4,
        intermediate_size=4 * WIDTH,
        max_position_embeddings=LENGTH,
        norm_eps=NORM_EPS[family],
    )
    ids = torch.randint(0, WORDS, (TOKENS,))
    batch = {
        "input_ids": ids,
        "position_ids": torch.arange(TOKENS) % LENGTH,
        "cu_seqlens": torch.arange(0, TOKENS + 1, LENGTH, dtype=torch.int32),
        "labels": ids[::3].clone(),
        "label_positions": torch.arange(0, TOKENS, 3),
        "max_seqlen": LENGTH,
    }
    return build_model(config, dropout=dropout, attention_dropout=dropout).train(), batch


def theirs(family: str, dropout: float) -> tuple[nn.Module, dict[str, Any]]:
    import transformers

    ids = torch.randint(0, WORDS, (TOKENS // LENGTH, LENGTH))
    batch = {"input_ids": ids, "labels": ids, "attention_mask": torch.ones_like(ids)}
    batch["attention_mask"][0, 9:] = 0
    shape: dict[str, Any] = {"vocab_size": WORDS, "use_cache": False}
    common = {"hidden_size": WIDTH, "num_hidden_layers": LAYERS, "num_attention_heads": 4, "intermediate_size": 128}
    model: nn.Module
    if family == "bert":
        drops = {"hidden_dropout_prob": dropout, "attention_probs_dropout_prob": dropout}
        model = transformers.BertForMaskedLM(transformers.BertConfig(**shape, **common, **drops))
    elif family == "gpt":
        drops = {"resid_pdrop": dropout, "embd_pdrop": dropout, "attn_pdrop": dropout}
        sizes = {"n_embd": WIDTH, "n_layer": LAYERS, "n_head": 4, "n_positions": LENGTH}
        # The name of the loss is one that transformers looks for, and would warn about.
        config = transformers.GPT2Config(**shape, **sizes, **drops, bos_token_id=0, eos_token_id=0)
        config.loss_type = "ForCausalLM"
        model = transformers.GPT2LMHeadModel(config)
    else:
        model = transformers.LlamaForCausalLM(transformers.LlamaConfig(**shape, **common, attention_dropout=dropout))
    return model.train(), batch


def blocks_of(model: nn.Module) -> nn.ModuleList:
    return max((m for m in model.modules() if isinstance(m, nn.ModuleList)), key=len)


def fake_batch(batch: dict[str, Any]) -> dict[str, Any]:
    return {
        name: fake_like(value) if isinstance(value, Tensor) and name != "cu_seqlens" else value
        for name, value in batch.items()
    }


def pass_of(model: nn.Module, batch: dict[str, Any]) -> Callable[[], None]:
    def run() -> None:
        out = model(**batch)
        torch.autograd.backward(out if isinstance(out, Tensor) else out.loss)

    return run


def agree(model: nn.Module, batch: dict[str, Any]) -> None:
    traced = trace(pass_of(as_fake(model), fake_batch(batch)))
    pass_of(model, batch)()
    model.zero_grad()
    measured = measure_beside_blocks(pass_of(model, batch))
    assert traced.peak_bytes == pytest.approx(measured.peak_bytes, rel=TOLERANCE, abs=SLACK_BYTES)
    assert traced.end_bytes == pytest.approx(measured.end_bytes, abs=SLACK_BYTES)


CASES = [
    (precision, policy, dropout)
    for precision, policy in [
        ("fp32", "none"),
        ("fp32", "selective"),
        ("fp32", "full"),
        ("bf16", "none"),
        ("bf16", "full"),
    ]
    for dropout in (0.0, 0.1)
]


@pytest.mark.parametrize(("precision", "policy", "dropout"), CASES)
@pytest.mark.parametrize("family", ["bert", "gpt", "llama"])
def test_own_models_hold_what_is_traced(family: str, precision: str, policy: str, dropout: float) -> None:
    model, batch = own(family, dropout)
    amp.apply(model, precision)
    recompute.apply(model.blocks, policy)
    agree(model, batch)


@pytest.mark.parametrize(
    ("precision", "policy"), [("fp32", "none"), ("fp32", "selective"), ("bf16", "none"), ("bf16", "full")]
)
@pytest.mark.parametrize("family", ["bert", "gpt", "llama"])
def test_models_of_transformers_hold_what_is_traced(family: str, precision: str, policy: str) -> None:
    model, batch = theirs(family, 0.1)
    amp.apply(model, precision)
    recompute.apply(blocks_of(model), policy)
    agree(model, batch)


def test_low_precision_with_selective_recompute() -> None:
    model, batch = own("bert", 0.1)
    amp.apply(model, "bf16")
    recompute.apply(model.blocks, "selective")
    agree(model, batch)


@pytest.mark.parametrize("maker", [torch.optim.AdamW, torch.optim.SGD, torch.optim.Adagrad])
def test_an_optimizers_first_and_second_step(maker: Any) -> None:
    def steps(model: nn.Module, batch: dict[str, Any]) -> Callable[[], None]:
        def run() -> None:
            optimizer = maker(model.parameters(), lr=1e-3)
            for _ in range(2):
                pass_of(model, batch)()
                optimizer.step()
                optimizer.zero_grad()

        return run

    (model, batch), (other, _) = own("gpt", 0.0), own("gpt", 0.0)
    traced = trace(steps(as_fake(other), fake_batch(batch)))
    pass_of(model, batch)()
    model.zero_grad()
    assert traced.peak_bytes == pytest.approx(measure(steps(model, batch)).peak_bytes, rel=TOLERANCE, abs=512)


def test_gradient_release_frees_each_gradient() -> None:
    def prepared(model: nn.Module) -> nn.Module:
        release(model.parameters(), torch.optim.SGD(model.parameters(), lr=0.1))
        return model

    model, batch = own("bert", 0.0)
    fake = prepared(as_fake(model))
    measured = measure(pass_of(prepared(model), batch))
    traced = trace(pass_of(fake, fake_batch(batch)))
    assert traced.peak_bytes == pytest.approx(measured.peak_bytes, rel=TOLERANCE, abs=SLACK_BYTES)
    assert traced.end_bytes == pytest.approx(measured.end_bytes, abs=512)  # the norms


def test_a_second_pass_adds_gradients_in_place() -> None:
    model, batch = own("gpt", 0.0)
    fake, shapes = as_fake(model), fake_batch(batch)
    trace(pass_of(fake, shapes))
    pass_of(model, batch)()
    traced, measured = trace(pass_of(fake, shapes)), measure(pass_of(model, batch))
    assert traced.peak_bytes == pytest.approx(measured.peak_bytes, rel=TOLERANCE, abs=SLACK_BYTES)
    assert traced.end_bytes == pytest.approx(0, abs=SLACK_BYTES)


class Twice(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, x: Tensor, kept: list[Tensor]) -> Tensor:
        ctx.kept = kept
        return x * 2

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor, None]:
        ctx.kept.append(grad)
        return grad * 2, None


@pytest.mark.parametrize("hold", [False, True])
def test_gradients_are_added_up_where_autograd_does_it(hold: bool) -> None:
    def run(weight: Tensor) -> Callable[[], None]:
        def inner() -> None:
            kept: list[Tensor] = []
            x = weight * 2
            y = (x + (Twice.apply(x, kept) if hold else x.exp())) * 3  # type: ignore[no-untyped-call]
            torch.autograd.backward((y * y).sum() + x.gather(0, torch.zeros_like(x, dtype=torch.long)).sum())

        return inner

    with fakes():
        fake = nn.Parameter(torch.empty(64, 64))
    traced, measured = trace(run(fake)), measure(run(nn.Parameter(torch.randn(64, 64))))
    assert traced.peak_bytes == pytest.approx(measured.peak_bytes, abs=SLACK_BYTES)


def test_the_timeline_tells_allocations_and_releases() -> None:
    def run() -> None:
        x = torch.empty(256)
        y = x.view(16, 16)
        del x
        y.exp_()
        z = y + 1
        del y, z

    assert trace(run).timeline == (1024, 2048, 1024, 0)
    assert trace(lambda: None).timeline == ()
    assert (trace(lambda: None).peak_bytes, trace(lambda: None).end_bytes) == (0, 0)


def test_the_release_of_what_was_there_before_counts() -> None:
    held = [fake_like(torch.empty(256))]

    def run() -> None:
        held[0].zero_()
        held.clear()

    assert trace(run).end_bytes == -1024


def test_a_number_made_inside_leaves_nothing() -> None:
    with fakes():
        x = torch.ones(3)
    found = trace(lambda: x * torch.tensor(2.0))
    assert found.end_bytes == 0 and min(found.timeline) >= 0 and found.peak_bytes == 12 + 4


def test_a_copy_keeps_ties_dtypes_and_gradient_dtypes_and_allocates_nothing() -> None:
    with torch.device("meta"):
        model, _ = own("bert", 0.1)
    amp.apply(model, "bf16", master_weights="split24", accumulated=True)
    fake = as_fake(model)
    assert {p.device.type for p in fake.parameters()} == {"cpu"}
    assert {p.dtype for p in fake.parameters()} == {torch.bfloat16}
    assert {p.grad_dtype for p in fake.parameters()} == {torch.float32}
    assert [n for n, _ in fake.named_parameters()] == [n for n, _ in model.named_parameters()]
    tied = nn.Sequential(nn.Linear(4, 4), nn.Linear(4, 4))
    tied[1].weight = tied[0].weight
    copied = as_fake(tied)
    assert copied[1].weight is copied[0].weight
    assert isinstance(tied[0].weight, nn.Parameter) and measure(lambda: as_fake(tied)).peak_bytes < 64


class Reads(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.inner = nn.Linear(4, 4)

    def forward(self, x: Tensor) -> Tensor:
        return self.inner(x)[: int(x.sum())]


def test_a_number_that_is_read_names_the_operation_and_the_module() -> None:
    model = as_fake(nn.Sequential(nn.Linear(4, 4), Reads()))
    with pytest.raises(InputError, match=r"^1 \(Reads\): aten\._local_scalar_dense.* needs numbers") as caught:
        trace(lambda: model(fake_like(torch.empty(2, 4))))
    assert "\n" not in str(caught.value)


def test_a_shape_that_depends_on_numbers_is_refused() -> None:
    with pytest.raises(InputError, match="the traced call: aten.nonzero"):
        trace(lambda: fake_like(torch.empty(4)).nonzero())


def test_a_condition_is_answered_only_if_asked() -> None:
    def run() -> Tensor:
        x = torch.empty(256)
        return x + 1 if torch.isfinite(x.sum()) else x

    with pytest.raises(InputError, match="_local_scalar_dense"):
        trace(run)
    assert max(trace(run, condition=True).timeline) == 2048
    assert max(trace(run, condition=False).timeline) < 2048


def test_real_numbers_can_be_read() -> None:
    lengths = torch.tensor([0, 2, 5])
    seen: list[int] = []
    trace(lambda: seen.extend(lengths.diff().tolist()))
    assert seen == [2, 3]


def test_positions_can_be_read() -> None:
    seen: list[object] = []

    def run() -> Tensor:
        positions = torch.arange(4) + 1
        seen.append((positions.tolist(), bool((positions.diff() == 1).all()), isinstance(positions, FakeTensor)))
        return fake_like(torch.empty(4)) * positions

    assert trace(run).peak_bytes >= 4 * 8
    assert seen == [([1, 2, 3, 4], True, False)]


def test_nothing_large_is_computed_for_real() -> None:
    seen: list[bool] = []
    row = torch.arange(REAL_ELEMENTS // 1024)

    def run() -> None:
        for other in (1024, 2048):
            seen.append(isinstance(row[None] >= torch.arange(other)[:, None], FakeTensor))

    trace(run)
    assert seen == [False, True]


def test_the_random_states_function_is_put_back() -> None:
    before = torch.get_rng_state
    with pytest.raises(InputError):
        trace(lambda: fake_like(torch.empty(4)).nonzero())
    assert torch.get_rng_state is before and torch.random.get_rng_state is before
