"""A model traced by blocks adds up to the trace of the whole."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import Tensor, nn

from bigtrain import amp, recompute
from bigtrain.batch import unpad
from bigtrain.config.model import NORM_EPS, ModelConfig
from bigtrain.errors import InputError
from bigtrain.memory.trace import as_fake, fake_like, trace
from bigtrain.memory.trace_model import REAL, trace_model
from bigtrain.models.build import build_model

WORDS, WIDTH, LENGTH, LAYERS = 96, 32, 12, 3
MIXED = ["full", "selective", "none"]


def own(family: str, layers: int = LAYERS) -> nn.Module:
    config = ModelConfig(
        family=family,  # type: ignore[arg-type]
        vocab_size=WORDS,
        hidden_size=WIDTH,
        num_hidden_layers=layers,
        num_attention_heads=4,
        num_key_value_heads=4,
        intermediate_size=4 * WIDTH,
        max_position_embeddings=LENGTH,
        norm_eps=NORM_EPS[family],
    )
    return build_model(config, dropout=0.1, attention_dropout=0.0).train()


def theirs(family: str) -> nn.Module:
    import transformers

    common = {"hidden_size": WIDTH, "num_hidden_layers": LAYERS, "num_attention_heads": 4, "intermediate_size": 128}
    shape: dict[str, Any] = {"vocab_size": WORDS, "use_cache": False}
    if family == "bert":
        model: nn.Module = transformers.BertForMaskedLM(transformers.BertConfig(**shape, **common))
    elif family == "gpt":
        config = transformers.GPT2Config(
            **shape, n_embd=WIDTH, n_layer=LAYERS, n_head=4, bos_token_id=0, eos_token_id=0
        )
        config.loss_type = "ForCausalLM"
        model = transformers.GPT2LMHeadModel(config)
    else:
        model = transformers.LlamaForCausalLM(transformers.LlamaConfig(**shape, **common))
    return model.train()


def rows(count: int) -> dict[str, Tensor]:
    ids = torch.arange(count * LENGTH).reshape(count, LENGTH) % WORDS
    return {"input_ids": ids, "labels": ids, "document_lengths": torch.tensor([[8, 4]] * count)}


def padded(count: int) -> dict[str, Tensor]:
    ids = torch.arange(count * LENGTH).reshape(count, LENGTH) % WORDS
    return {"input_ids": ids, "labels": ids, "attention_mask": torch.ones_like(ids)}


def whole(model: nn.Module, batch: dict[str, Any], policies: str | list[str], *, accumulated: bool = False) -> int:
    fake = as_fake(model)
    recompute.apply(max((m for m in fake.modules() if isinstance(m, nn.ModuleList)), key=len), policies)
    given = {k: fake_like(v) if isinstance(v, Tensor) and k not in REAL else v for k, v in batch.items()}

    def run() -> None:
        out = fake(**given)
        torch.autograd.backward(out if isinstance(out, Tensor) else out.loss)

    if accumulated:
        trace(run)
    return trace(run).peak_bytes


@pytest.mark.slow
@pytest.mark.parametrize("family", ["bert", "gpt", "llama"])
def test_own_models_add_up_to_the_byte(family: str) -> None:
    model, batch = own(family), unpad(rows(4))
    found = trace_model(model, batch)
    assert len(found.kinds) == 1 and found.calls == (0,) * LAYERS
    for policies in ("none", MIXED):
        assert found.peak_bytes(policies) == whole(model, batch, policies)
    assert found.peak_bytes("full", accumulated=True) == whole(model, batch, "full", accumulated=True)


def test_low_precision_adds_up() -> None:
    model, batch = own("llama"), unpad(rows(4))
    amp.apply(model, "bf16")
    assert trace_model(model, batch).peak_bytes("full") == whole(model, batch, "full")


@pytest.mark.parametrize("family", ["bert", "gpt", "llama"])
def test_models_of_transformers_add_up(family: str) -> None:
    model = theirs(family)
    found = trace_model(model, padded(4))
    assert len(found.kinds) == 1
    for policies in ("none", "full"):
        assert found.peak_bytes(policies) == pytest.approx(whole(model, padded(4), policies), rel=5e-3)


def test_rows_rescale_a_sample() -> None:
    assert trace_model(theirs("gpt"), padded(1), rows=4) == trace_model(theirs("gpt"), padded(4))
    assert trace_model(own("gpt"), rows(1), rows=4) == trace_model(own("gpt"), unpad(rows(4)))
    with pytest.raises(InputError, match="rows=4: the sample is a flat row"):
        trace_model(own("gpt"), unpad(rows(1)), rows=4)


def test_a_model_on_the_meta_device_of_any_depth() -> None:
    with torch.device("meta"):
        deep = own("gpt", layers=9)
    found = trace_model(deep, rows(2))
    assert found.parameter_bytes == sum(p.nbytes for p in deep.parameters()) == found.gradient_bytes
    assert len(found.kinds) == 1 and len(found.calls) == 9
    assert all(p.is_meta for p in deep.parameters()) and not any("forward" in vars(b) for b in deep.blocks)


def test_blocks_that_differ_are_kinds_of_their_own() -> None:
    model = Stack([Layer(16, 32), Layer(16, 64), Layer(16, 32), Layer(16, 32, scale=0.5)])
    found = trace_model(model, [torch.zeros(8, 16)], forward=total)
    assert found.calls == (0, 1, 0, 2)
    assert [kind.name for kind in found.kinds] == ["Layer"] * 3
    assert found.kinds[0].input_bytes == found.kinds[0].output_bytes == 8 * 16 * 4


def test_a_block_that_runs_several_times_has_one_gradient() -> None:
    layer = Layer(16, 32)
    model = Stack([layer], times=3)
    found = trace_model(model, [torch.zeros(8, 16)], forward=total, blocks=[layer])
    assert found.again == {0, 1} and found.gradient_bytes == found.parameter_bytes
    fake, x = as_fake(model), fake_like(torch.zeros(8, 16))
    assert found.peak_bytes("none") == pytest.approx(trace(_backward(fake, x)).peak_bytes, rel=0.15)


def test_blocks_are_found_by_class() -> None:
    model = Stack([Layer(16, 32), Layer(16, 32)])
    assert len(trace_model(model, [torch.zeros(8, 16)], forward=total, blocks=nn.Linear).calls) == 5
    with pytest.raises(InputError, match="Stack: has no module of class Conv1d"):
        trace_model(model, [torch.zeros(8, 16)], forward=total, blocks=nn.Conv1d)


def test_what_is_no_loss_is_refused() -> None:
    with pytest.raises(InputError, match=r"Stack: returns no scalar loss but a tensor \(8, 16\); give forward="):
        trace_model(Stack([Layer(16, 32)]), [torch.zeros(8, 16)])


def test_a_number_of_policies_that_does_not_fit() -> None:
    found = trace_model(Stack([Layer(16, 32)]), [torch.zeros(8, 16)], forward=total)
    with pytest.raises(ValueError, match="2 policies for 1 blocks"):
        found.peak_bytes(["none", "full"])


def test_control_flow_on_numbers_names_the_module() -> None:
    model = Stack([Layer(16, 32), Reader(16, 32)])
    with pytest.raises(InputError, match=r"layers\.1 \(Reader\): aten\._local_scalar_dense"):
        trace_model(model, [torch.zeros(8, 16)], forward=total)


def total(model: nn.Module, sample: Any) -> Tensor:
    return torch.sum(model(*sample))


class Layer(nn.Module):
    def __init__(self, width: int, inner: int, scale: float = 1.0) -> None:
        super().__init__()
        self.up, self.down, self.scale = nn.Linear(width, inner), nn.Linear(inner, width), scale

    def forward(self, x: Tensor) -> Tensor:
        return x + self.scale * self.down(self.up(x).relu())


class Reader(Layer):
    def forward(self, x: Tensor) -> Tensor:
        return super().forward(x) if x.sum() > 0 else x


class Stack(nn.Module):
    def __init__(self, layers: list[nn.Module], times: int = 1) -> None:
        super().__init__()
        self.layers, self.times = nn.ModuleList(layers), times
        self.first = nn.Linear(16, 16)

    def forward(self, x: Tensor) -> Tensor:
        x = self.first(x)
        for layer in list(self.layers) * self.times:
            x = layer(x)
        return x


def _backward(model: nn.Module, x: Tensor) -> Callable[[], None]:
    return lambda: torch.autograd.backward(model(x).sum())
