"""Any module made to compute in low precision: what is exchanged, what is read, what is kept."""

from __future__ import annotations

import copy
from collections.abc import Callable
from importlib import import_module
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.utils.checkpoint import checkpoint

from bigtrain.amp.modules import KINDS_BY_NAME, Rounded, compute_units, output_layer, plain_modules, round_modules
from bigtrain.config.model import ModelConfig
from bigtrain.errors import InputError
from bigtrain.models.build import build_model
from bigtrain.models.layers import Linear, Table

pytestmark = pytest.mark.usefixtures("torch_seed")
LOW = torch.bfloat16


class Scale(nn.Module):
    """A module with loose parameters and a child that has none."""

    def __init__(self, width: int = 16, dropout: float = 0.0) -> None:
        super().__init__()
        self.scale, self.shift = nn.Parameter(torch.randn(width)), nn.Parameter(torch.randn(width))
        self.dropout = nn.Dropout(dropout)
        self.seen: list[torch.dtype] | None = []

    def forward(self, x: Tensor, factor: float = 1.0, *, offset: Tensor | None = None) -> Tensor:
        if self.seen is not None:
            self.seen.append(self.scale.dtype)
        x = self.dropout(x * self.scale * factor + self.shift)
        return x if offset is None else x + offset


class Block(nn.Module):
    """One of each kind of module, with a gate parameter that no unit holds."""

    def __init__(self, dropout: float = 0.0) -> None:
        super().__init__()
        self.norm, self.other_norm = nn.LayerNorm(16), nn.RMSNorm(16)
        self.up, self.down = nn.Linear(16, 32), Linear(32, 16, bias=False, std=0.2)
        self.scale = Scale(dropout=dropout)
        self.gate = nn.Parameter(torch.randn(16))

    def forward(self, x: Tensor) -> Tensor:
        x = x + self.down(F.gelu(self.up(self.norm(x))))
        return x + self.scale(self.other_norm(x)) * self.gate.to(x.dtype)


def rounded(module: nn.Module, dtype: torch.dtype = LOW) -> Any:
    round_modules(module, dtype)
    return module


def kept_by(run: Callable[[], Any]) -> list[Tensor]:
    kept: list[Tensor] = []
    with torch.autograd.graph.saved_tensors_hooks(lambda tensor: kept.append(tensor) or tensor, lambda tensor: tensor):
        run()
    return kept


def same(found: nn.Module, expected: nn.Module) -> bool:
    pairs = zip(found.parameters(), expected.parameters(), strict=True)
    return all(torch.equal(a.grad, b.grad) for a, b in pairs if a.grad is not None and b.grad is not None)


def test_units_are_modules_with_parameters_and_none_below() -> None:
    assert [name for name, _ in compute_units(Block())] == ["norm", "other_norm", "up", "down", "scale"]
    assert [name for name, _ in compute_units(nn.TransformerEncoderLayer(4, 2))][:2] == ["self_attn", "linear1"]
    assert [name for name, _ in compute_units(nn.Linear(2, 2))] == [""]
    assert not list(compute_units(nn.Sequential(nn.GELU(), nn.LayerNorm(4, elementwise_affine=False))))


def test_names_parameters_and_kinds_stay() -> None:
    block = Block()
    before = dict(block.named_parameters())
    keys = list(block.state_dict())
    rounded(block)
    assert all(parameter is before[name] for name, parameter in block.named_parameters())
    assert list(block.state_dict()) == keys
    assert isinstance(block.down, Linear)
    assert isinstance(block.norm, nn.LayerNorm)
    assert "Linear_bfloat16(in_features=16, out_features=32" in repr(block)


def test_weights_go_in_and_out_of_state_dicts() -> None:
    block, other = rounded(Block()), Block()
    block.load_state_dict(other.state_dict())
    other.load_state_dict(block.state_dict())
    assert torch.equal(block.up.weight, other.up.weight)


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_a_block_agrees_with_fp64_within_rounding(dtype: torch.dtype) -> None:
    block = Block()
    exact = copy.deepcopy(block).double()
    x, grad = torch.randn(40, 16), torch.randn(40, 16)
    out, expected = rounded(block, dtype)(x.to(dtype)), exact(x.double())
    out.backward(grad.to(dtype))
    expected.backward(grad.double())
    rounding = torch.finfo(dtype).eps
    assert out.dtype == dtype
    assert float((out.detach().double() - expected.detach()).norm() / expected.detach().norm()) < 2 * rounding
    for (name, mine), theirs in zip(block.named_parameters(), exact.parameters(), strict=True):
        assert mine.grad is not None and mine.grad.dtype == torch.float32, name
        assert float((mine.grad.double() - theirs.grad).norm() / theirs.grad.norm()) < 4 * rounding, name


def test_everything_kept_is_low_precision_or_a_parameter_or_a_statistic() -> None:
    block = rounded(Block())
    own = {parameter.untyped_storage().data_ptr() for parameter in block.parameters()}
    x = torch.randn(40, 16).bfloat16().requires_grad_()
    others = [t for t in kept_by(lambda: block(x)) if t.untyped_storage().data_ptr() not in own]
    assert {tuple(t.shape) for t in others if t.dtype == torch.float32} == {(40, 1)}
    matrices = [parameter.shape for parameter in block.parameters() if parameter.ndim == 2]
    assert not [t for t in others if t.shape in matrices or t.shape[::-1] in matrices]


@pytest.mark.parametrize("make", [lambda: nn.Embedding(9, 4, padding_idx=0), lambda: Table(9, 4, std=0.02)])
def test_rows_are_rounded_not_the_table(make: Callable[[], nn.Module]) -> None:
    table = make()
    plain = copy.deepcopy(table)
    index = torch.tensor([[1, 2, 0], [2, 2, 8]]).flatten()
    rounded(table)
    out = table(index)
    assert torch.equal(out, plain(index).bfloat16())
    assert not [t for t in kept_by(lambda: table(index)) if t.is_floating_point()]
    grad = torch.randn(6, 4).bfloat16()
    out.backward(grad)
    plain(index).backward(grad.float())
    assert same(table, plain)


def test_a_module_of_unknown_insides_reads_rounded_parameters_and_gets_its_own_back() -> None:
    module = Scale()
    kept = dict(module.named_parameters())
    rounded(module)
    x, offset = torch.randn(3, 16), torch.randn(16)
    out = module(x, 2.0, offset=offset)
    assert (module.seen, out.dtype) == ([LOW], LOW)
    assert all(parameter is kept[name] for name, parameter in module.named_parameters())
    low = {name: parameter.detach().bfloat16() for name, parameter in kept.items()}
    assert torch.equal(out, x.bfloat16() * low["scale"] * 2.0 + low["shift"] + offset.bfloat16())


def test_parameters_are_back_after_an_error() -> None:
    module = rounded(Scale())
    before = module.scale
    with pytest.raises(RuntimeError, match="must match"):
        module(torch.randn(3, 17))
    assert module.scale is before


def test_several_modules_may_share_a_parameter() -> None:
    model = nn.Sequential(nn.Linear(16, 16, bias=False), Scale(), nn.Linear(16, 16, bias=False))
    model[2].weight = model[0].weight
    exact = copy.deepcopy(model).double()
    rounded(model)
    assert model[2].weight is model[0].weight
    x = torch.randn(5, 16)
    model(x).float().sum().backward()
    exact(x.double()).sum().backward()
    found, expected = model[0].weight.grad.double(), exact[0].weight.grad
    assert float((found - expected).norm() / expected.norm()) < 0.02


def test_a_copy_computes_with_its_own_parameters() -> None:
    module = rounded(nn.Linear(16, 4))
    other = copy.deepcopy(module)
    with torch.no_grad():
        other.weight.zero_()
        other.bias.zero_()
    x = torch.randn(3, 16)
    assert not other(x).any()
    assert module(x).any()


def test_plain_modules_are_what_they_were() -> None:
    block = Block()
    kinds = [type(module) for module in block.modules()]
    expected = block(torch.ones(2, 16))
    rounded(block)
    assert any(isinstance(module, Rounded) for module in block.modules())
    plain_modules(block)
    assert [type(module) for module in block.modules()] == kinds
    assert torch.equal(block(torch.ones(2, 16)), expected)


def test_modules_of_one_class_share_one_exchanged_class() -> None:
    model = rounded(nn.Sequential(nn.Linear(2, 2), nn.Linear(2, 3), rounded(nn.Linear(3, 2), torch.float16)))
    assert type(model[0]) is type(model[1])
    assert type(model[0]) is not nn.Linear


def test_a_subclass_with_its_own_forward_keeps_it() -> None:
    class Doubled(nn.Linear):
        def forward(self, x: Tensor) -> Tensor:
            assert self.weight.dtype == LOW
            return 2 * super().forward(x)

    layer = Doubled(4, 4)
    x = torch.randn(2, 4)
    expected = 2 * F.linear(x.bfloat16(), layer.weight.bfloat16(), layer.bias.bfloat16())
    torch.testing.assert_close(rounded(layer)(x), expected)


def test_a_forward_that_stands_beside_the_class_is_refused_and_nothing_is_changed() -> None:
    model = nn.Sequential(nn.Linear(4, 4), nn.Linear(4, 4))
    model[1].forward = lambda x: x
    with pytest.raises(
        InputError, match="1: Linear has a forward of its own beside its class's; give it a class, or use"
    ):
        round_modules(model, LOW)
    assert type(model[0]) is nn.Linear


def test_recurrent_layers_are_refused() -> None:
    with pytest.raises(InputError, match="rnn: LSTM reads its weights around its attributes; use amp.precision=fp32"):
        round_modules(nn.ModuleDict({"rnn": nn.LSTM(4, 4)}), LOW)


@pytest.mark.parametrize("training", [True, False])
@pytest.mark.parametrize("depth", [0, 2])
def test_torchs_encoder_computes_low_in_training_and_in_inference(training: bool, depth: int) -> None:
    """In inference its plain self hands fp32 parameters to one kernel, or meets their dtypes mixed."""
    layer = nn.TransformerEncoderLayer(16, 2, 32, batch_first=True, dropout=0.0)
    model = nn.TransformerEncoder(layer, depth) if depth else layer
    exact = copy.deepcopy(model).double().train()
    rounded(model).train(training)
    x, padding = torch.randn(2, 5, 16), torch.tensor([[False] * 5, [False] * 3 + [True] * 2])
    with torch.set_grad_enabled(training):
        out = model(x, src_key_padding_mask=padding)
    assert out.dtype == LOW
    assert torch.backends.mha.get_fastpath_enabled()
    kept = ~padding
    torch.testing.assert_close(
        out[kept].double(), exact(x.double(), src_key_padding_mask=padding)[kept], rtol=0.05, atol=0.05
    )


@pytest.mark.parametrize("dtype", [torch.float32, LOW])
def test_checkpointing_a_block_changes_no_bit(dtype: torch.dtype) -> None:
    block = rounded(Block(dropout=0.3))
    twin = copy.deepcopy(block)
    x = torch.randn(8, 16).to(dtype)
    grad = torch.randn(8, 16).to(block(x).dtype)
    results = []
    for module, run in ((block, block), (twin, lambda x: checkpoint(twin, x, use_reentrant=False))):
        torch.manual_seed(5)
        leaf = x.clone().requires_grad_()
        out = run(leaf)
        out.backward(grad)
        results.append((out, leaf.grad, module))
    assert torch.equal(results[0][0], results[1][0])
    assert torch.equal(results[0][1], results[1][1])
    assert same(block, twin)


@pytest.mark.slow
# torch.compile itself does both while it traces an autograd function.
@pytest.mark.filterwarnings("ignore:.*Function'> should not be instantiated:DeprecationWarning")
@pytest.mark.filterwarnings("ignore:The .grad attribute of a Tensor that is not a leaf:UserWarning")
def test_a_compiled_block_agrees() -> None:
    """With fp32 masters and with bf16 weights; without a break in the graph."""
    low = nn.Sequential(nn.LayerNorm(16), nn.Linear(16, 16, bias=False)).bfloat16()
    block = rounded(nn.Sequential(nn.Linear(16, 16), nn.RMSNorm(16), Scale(), low))
    block[2].seen = None
    twin = copy.deepcopy(block)
    twin.compile(backend="aot_eager", dynamic=True, fullgraph=True)
    x = torch.randn(8, 16).bfloat16()
    grad = torch.randn(8, 16).bfloat16()
    for module in (block, twin):
        module(x).backward(grad)
    assert torch.equal(block(x), twin(x))
    assert [p.grad.dtype for p in twin.parameters()] == [p.dtype for p in twin.parameters()]
    for mine, compiled in zip(block.parameters(), twin.parameters(), strict=True):
        torch.testing.assert_close(mine.grad, compiled.grad, rtol=2**-7, atol=1e-2)


@pytest.mark.parametrize("family", ["bert", "gpt", "llama"])
def test_our_models_compute_low_and_lose_in_fp32(family: str) -> None:
    config = ModelConfig(
        family=family,
        vocab_size=50,
        hidden_size=32,
        num_hidden_layers=2,
        num_attention_heads=2,
        num_key_value_heads=2,
        intermediate_size=64,
        max_position_embeddings=16,
    )
    model = build_model(config)
    exact = copy.deepcopy(model)
    batch = {
        "input_ids": torch.randint(0, 50, (12,)),
        "position_ids": torch.arange(12),
        "cu_seqlens": torch.tensor([0, 12], dtype=torch.int32),
        "labels": torch.randint(0, 50, (12,)),
        "label_positions": torch.arange(12),
    }
    seen = set()
    for block in rounded(model).blocks:
        block.register_forward_hook(lambda module, args, out: seen.add((args[0].dtype, out.dtype)))
    loss, expected = model(**batch), exact(**batch)
    loss.backward()
    expected.backward()
    assert loss.dtype == torch.float32
    assert seen == {(LOW, LOW)}
    torch.testing.assert_close(loss, expected, rtol=2e-3, atol=0)
    grads = [torch.cat([p.grad.flatten() for p in m.parameters() if p.grad is not None]) for m in (model, exact)]
    assert grads[0].dtype == torch.float32
    assert float((grads[0] - grads[1]).norm() / grads[1].norm()) < 0.02


@pytest.mark.parametrize("name", sorted({name for _, name in KINDS_BY_NAME}))
def test_classes_known_by_name_exist(name: str) -> None:
    """A renamed class would be computed as one of unknown insides."""
    for module in (module for module, known in KINDS_BY_NAME if known == name):
        assert issubclass(getattr(import_module(module), name), nn.Module)


def test_only_transformers_models_name_an_output_layer() -> None:
    assert output_layer(Block()) is None
    model = Block()
    model.get_output_embeddings = lambda: None
    assert output_layer(model) is None
    model.get_output_embeddings = lambda: model.up
    assert output_layer(model) is model.up
    rounded(model)
    assert model.up(torch.ones(1, 16)).dtype == torch.float32
    assert model.down(torch.ones(1, 32)).dtype == LOW
