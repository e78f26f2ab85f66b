"""Weights start as they should; blocks run whole, in bf16, compiled and recomputed."""

from __future__ import annotations

import pytest
import torch
import torch.nn.functional as F
from torch._subclasses.fake_tensor import FakeTensorMode
from torch.utils.checkpoint import checkpoint

from bigtrain.models import layers
from bigtrain.models.attention import Documents
from bigtrain.models.layers import Block, Dropout, GatedMLP, Linear, Table, residual_std, rotary_table, rotate
from bigtrain.models.lookup import Lookup

FAMILIES = ("bert", "gpt", "llama")
compiles = pytest.mark.filterwarnings(
    # Raised and hidden inside torch's compiler, at a graph break and at an autograd Function, where "error" would make
    # them fatal.
    "ignore:The .grad attribute of a Tensor that is not a leaf:UserWarning",
    "ignore:.*should not be instantiated:DeprecationWarning",
)
LENGTHS = [5, 5, 3]


def block_and_inputs(config, **options):
    """Return a block with what it takes."""
    block = Block(config, **{"dropout": 0.0, "attention_dropout": 0.0, **options})
    x = torch.randn(sum(LENGTHS), config.hidden_size, requires_grad=True)
    positions = torch.cat([torch.arange(length) for length in LENGTHS])
    rotary = rotary_table(positions, config.head_dim, 10000.0) if config.family == "llama" else None
    return block, (x, Documents.of_lengths(LENGTHS), rotary)


def test_linear_starts_normal_with_a_zero_bias(torch_seed):
    linear = Linear(200, 300, bias=True, std=0.05)
    assert linear.weight.std().item() == pytest.approx(0.05, rel=0.02)
    assert abs(linear.weight.mean().item()) < 1e-3
    assert not linear.bias.any()
    assert Linear(2, 3, bias=False, std=0.05).bias is None


def test_table_looks_up_rows_and_keeps_padding_zero(torch_seed):
    table = Table(10, 4, std=0.5, padding=6)
    assert table.weight.shape == (16, 4)
    assert table.weight[:10].all()
    assert not table.weight[10:].any()
    assert torch.equal(table(torch.tensor([3, 0, 3])), table.weight[[3, 0, 3]])
    table(torch.arange(10)).sum().backward()
    assert not table.weight.grad[10:].any()
    assert torch.equal(table(torch.tensor([3, 0, 3]), Lookup()), table.weight[[3, 0, 3]])


@pytest.mark.parametrize("module", (Linear(3, 4, bias=True, std=0.1), Table(5, 3, std=0.1, padding=2)), ids=repr)
def test_reset_draws_the_same_from_the_same_seed(torch_seed, module):
    torch.manual_seed(7)
    module.reset_parameters()
    first = module.weight.clone()
    module.reset_parameters()
    assert not torch.equal(module.weight, first)
    torch.manual_seed(7)
    module.reset_parameters()
    assert torch.equal(module.weight, first)


def test_gpt_scales_what_joins_the_residual_stream(tiny):
    assert residual_std(tiny("gpt", num_hidden_layers=8)) == pytest.approx(0.1 / 4)
    assert residual_std(tiny("bert")) == residual_std(tiny("llama")) == 0.1
    block = Block(tiny("gpt", num_hidden_layers=8), dropout=0.0, attention_dropout=0.0)
    assert block.attention.out.std == block.mlp.down.std == pytest.approx(0.025)
    assert block.attention.qkv.std == block.mlp.up.std == 0.1


@pytest.mark.parametrize("family", FAMILIES)
def test_only_llama_goes_without_biases(tiny, family):
    block = Block(tiny(family), dropout=0.0, attention_dropout=0.0)
    biases = [name for name, _ in block.named_parameters() if name.endswith("bias")]
    assert len(biases) == (0 if family == "llama" else 6)
    assert block.attention.causal == (family != "bert")


def test_gated_mlp_is_swiglu(torch_seed, tiny):
    mlp = GatedMLP(tiny("llama"), output_std=0.1)
    x = torch.randn(6, 32)
    gate, up = mlp.gate_up.weight.split([48, 48])
    right = (F.silu(x @ gate.T) * (x @ up.T)) @ mlp.down.weight.T
    torch.testing.assert_close(mlp(x), right)


def test_bert_norms_after_and_the_others_before(torch_seed, tiny):
    for family in FAMILIES:
        block, inputs = block_and_inputs(tiny(family))
        out = block(*inputs)
        normalized = bool((out.mean(1).abs() < 1e-5).all() and ((out.std(1, correction=0) - 1).abs() < 1e-3).all())
        assert normalized == (family == "bert")


def test_rotation_keeps_lengths_and_depends_on_distance_only(torch_seed):
    q, k = torch.randn(8), torch.randn(8)
    rotary = rotary_table(torch.arange(50), 8, 100.0)
    turned_q = rotate(q.expand(50, 1, 8), rotary, 1)[:, 0]
    turned_k = rotate(k.expand(50, 1, 8), rotary, 1)[:, 0]
    torch.testing.assert_close(turned_q.norm(dim=1), q.norm().expand(50))
    products = turned_q @ turned_k.T
    torch.testing.assert_close(products.diagonal(3), products[0, 3].expand(47), rtol=1e-4, atol=1e-5)
    torch.testing.assert_close(turned_q[0], q)


def test_rotation_by_hand():
    cos, sin = rotary_table(torch.tensor([0, 2]), 4, 100.0)
    angles = torch.tensor([[0.0, 0.0], [2.0, 0.2]])
    torch.testing.assert_close(cos[:, 0], angles.cos())
    torch.testing.assert_close(sin[:, 0], angles.sin())
    x = torch.tensor([1.0, 2.0, 3.0, 4.0]).expand(2, 1, 4)
    turned = rotate(x, (cos, sin), 1)[1, 0]
    c, s = angles[1].cos(), angles[1].sin()
    torch.testing.assert_close(
        turned, torch.cat((x[1, 0, :2] * c - x[1, 0, 2:] * s, x[1, 0, 2:] * c + x[1, 0, :2] * s))
    )


def test_rotation_returns_the_dtype_that_came():
    rotary = rotary_table(torch.arange(3), 4, 100.0)
    x = torch.ones(3, 2, 4, dtype=torch.bfloat16, requires_grad=True)
    turned = rotate(x, rotary, 1)
    turned.sum().backward()
    assert turned.dtype == x.grad.dtype == torch.bfloat16
    assert rotary[0].dtype == torch.float32


def test_rotation_is_computed_in_fp32(torch_seed):
    rotary, x = rotary_table(torch.arange(50), 8, 100.0), torch.randn(50, 3, 8).bfloat16()
    assert torch.equal(rotate(x, rotary, 2), rotate(x.float(), rotary, 2).bfloat16())


def test_rotation_leaves_values_alone(torch_seed):
    rotary, x = rotary_table(torch.arange(6), 8, 100.0), torch.randn(6, 5, 8)
    turned = rotate(x, rotary, 3)
    assert torch.equal(turned[:, 3:], x[:, 3:])
    assert not torch.equal(turned[:, :3], x[:, :3])
    assert torch.equal(turned[:, :3], rotate(x[:, :3], rotary, 3))


@pytest.mark.parametrize("heads", (1, 3, 4))
def test_rotation_has_the_right_derivatives(torch_seed, heads):
    rotary = tuple(angles.double() for angles in rotary_table(torch.tensor([0, 1, 2, 0, 1]), 6, 100.0))
    x = torch.randn(5, 4, 6, dtype=torch.float64, requires_grad=True)
    assert torch.autograd.gradcheck(lambda x: rotate(x, rotary, heads), (x,))


def test_rotation_keeps_its_angles_only(torch_seed):
    kept, rotary = [], rotary_table(torch.arange(6), 8, 100.0)
    x = torch.randn(6, 5, 8, requires_grad=True)
    with torch.autograd.graph.saved_tensors_hooks(lambda tensor: kept.append(tensor) or tensor, lambda tensor: tensor):
        rotate(x, rotary, 3)
    assert [tensor.data_ptr() for tensor in kept] == [angles.data_ptr() for angles in rotary]


@pytest.mark.parametrize("probability", (0.1, 0.5, 0.9))
@pytest.mark.parametrize("dtype", (torch.float32, torch.bfloat16))
def test_dropout_zeroes_a_share_and_scales_the_rest(torch_seed, probability, dtype):
    x = torch.ones(400, 500, dtype=dtype, requires_grad=True)
    out = Dropout(probability)(x)
    left = out != 0
    spread = (probability * (1 - probability) / x.numel()) ** 0.5
    assert abs(1 - left.double().mean().item() - probability) < 5 * spread
    assert out.dtype == dtype
    scale = torch.tensor(1 / (1 - probability), dtype=dtype)
    torch.testing.assert_close(out[left], scale.expand(int(left.sum())))
    out.sum().backward()
    assert torch.equal(x.grad, out.detach())


def test_dropout_keeps_a_byte_for_each_number(torch_seed):
    kept, x = [], torch.ones(30, 40, requires_grad=True)
    with torch.autograd.graph.saved_tensors_hooks(lambda tensor: kept.append(tensor) or tensor, lambda tensor: tensor):
        out = Dropout(0.3)(x)
    assert [(tensor.nbytes, tensor.dtype) for tensor in kept] == [(x.numel(), torch.bool)]
    assert torch.equal(kept[0], out != 0)


def test_dropout_gives_back_what_came_where_it_has_nothing_to_do():
    x = torch.ones(3)
    assert Dropout(0.0)(x) is x
    assert Dropout(0.5).eval()(x) is x
    assert not Dropout(1.0)(x).any()


def test_dropout_follows_the_seed(torch_seed):
    drop, x = Dropout(0.5), torch.ones(1000)
    first, other = drop(x), drop(x)
    torch.manual_seed(torch_seed)
    assert torch.equal(drop(x), first)
    assert not torch.equal(first, other)


@pytest.mark.parametrize("family", FAMILIES)
def test_whole_bf16_stays_near(torch_seed, tiny, family):
    block, (x, *where) = block_and_inputs(tiny(family))
    exact = block(x, *where)
    half = block.bfloat16()(x.bfloat16(), *where)
    half.float().sum().backward()
    assert half.dtype == torch.bfloat16
    torch.testing.assert_close(half.float(), exact, rtol=0.05, atol=0.1)
    assert all(parameter.grad.dtype == torch.bfloat16 for parameter in block.parameters())


@pytest.mark.parametrize("family", FAMILIES)
@pytest.mark.parametrize("dropout", (0.0, 0.3))
def test_recomputing_changes_no_bit(torch_seed, tiny, family, dropout):
    block, inputs = block_and_inputs(tiny(family), dropout=dropout, attention_dropout=dropout)
    results = []
    for run in (block, lambda *args: checkpoint(block, *args, use_reentrant=False)):
        torch.manual_seed(3)
        out = run(*inputs)
        results.append((out, *torch.autograd.grad(out.square().sum(), [inputs[0], *block.parameters()])))
    assert all(torch.equal(kept, again) for kept, again in zip(*results, strict=True))


@pytest.mark.parametrize("name", ("dropout", "attention_dropout"))
def test_dropout_acts_in_training_only(torch_seed, tiny, name):
    block, inputs = block_and_inputs(tiny("gpt"), **{name: 0.5})
    assert not torch.equal(block(*inputs), block(*inputs))
    block.eval()
    assert torch.equal(block(*inputs), block(*inputs))


@pytest.mark.parametrize("family", FAMILIES)
def test_a_block_can_be_traced_on_fake_tensors(tiny, family):
    with FakeTensorMode():
        block, inputs = block_and_inputs(tiny(family))
        block(*inputs).sum().backward()
    assert inputs[0].grad.shape == (sum(LENGTHS), 32)


@compiles
@pytest.mark.parametrize("family", ("bert", "llama"))
def test_compiling_a_block_changes_nothing_that_matters(torch_seed, tiny, family):
    block, inputs = block_and_inputs(tiny(family))
    compiled = torch.compile(block, backend="aot_eager")
    parameters = [inputs[0], *block.parameters()]
    right, found = block(*inputs), compiled(*inputs)
    torch.testing.assert_close(found, right)
    torch.testing.assert_close(
        torch.autograd.grad(found.sum(), parameters), torch.autograd.grad(right.sum(), parameters)
    )


@compiles
def test_a_compiled_block_serves_other_lengths(torch_seed, tiny):
    block, (x, _, _) = block_and_inputs(tiny("gpt"))
    compiled = torch.compile(block, backend="eager")
    for lengths in ([13], [6, 7], [1] * 13, [4, 4, 5]):
        documents = Documents.of_lengths(lengths)
        torch.testing.assert_close(compiled(x, documents), block(x, documents))


@compiles
@pytest.mark.parametrize("family", FAMILIES)
@pytest.mark.parametrize("dropout", (0.0, 0.3))
def test_the_graph_breaks_at_attention_only(torch_seed, tiny, monkeypatch, family, dropout):
    block, inputs = block_and_inputs(tiny(family), dropout=dropout)
    monkeypatch.setattr(layers, "attend", lambda qkv, heads, documents, *, causal, dropout: 2 * qkv[:, : heads[0]])
    torch._dynamo.reset()
    torch.compile(block, backend="eager", fullgraph=True)(*inputs)
