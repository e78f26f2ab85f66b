"""amp.apply: what parameters, gradients and activations are at each precision, transformers models included."""

from __future__ import annotations

import copy
from collections.abc import Callable
from typing import Any

import pytest
import torch
import transformers
from torch import Tensor, nn

from bigtrain import amp
from bigtrain.amp import precision as precisions
from bigtrain.errors import InputError

pytestmark = pytest.mark.usefixtures("torch_seed")
SIZES = {"vocab_size": 60, "bos_token_id": 1, "eos_token_id": 2, "pad_token_id": 0}


def small() -> nn.Sequential:
    return nn.Sequential(nn.Linear(8, 16), nn.GELU(), nn.LayerNorm(16), nn.Linear(16, 4))


def bert() -> Any:
    config = transformers.BertConfig(
        hidden_size=32, num_hidden_layers=2, num_attention_heads=2, intermediate_size=64, hidden_dropout_prob=0.0,
        attention_probs_dropout_prob=0.0, max_position_embeddings=32, **SIZES,
    )  # fmt: skip
    return transformers.BertForMaskedLM(config)


def gpt2() -> Any:
    config = transformers.GPT2Config(
        n_embd=32, n_layer=2, n_head=2, n_positions=32, resid_pdrop=0.0, embd_pdrop=0.0, attn_pdrop=0.0, **SIZES
    )
    config.loss_type = "ForCausalLM"
    return transformers.GPT2LMHeadModel(config)


def llama(*, tied: bool = True) -> Any:
    config = transformers.LlamaConfig(
        hidden_size=32, num_hidden_layers=2, num_attention_heads=2, num_key_value_heads=1, intermediate_size=64,
        max_position_embeddings=32, tie_word_embeddings=tied, **SIZES,
    )  # fmt: skip
    return transformers.LlamaForCausalLM(config)


FAMILIES = pytest.mark.parametrize(
    "family", [bert, gpt2, llama, lambda: llama(tied=False)], ids=["bert", "gpt2", "llama", "untied"]
)


def flat(tensors: list[Tensor | None]) -> Tensor:
    return torch.cat([tensor.double().flatten() for tensor in tensors if tensor is not None])


def test_fp32_changes_nothing() -> None:
    model = small()
    before = {name: (type(m), dict(vars(m))) for name, m in model.named_modules()}
    weights = {name: (id(p), p.data_ptr(), p.grad_dtype) for name, p in model.named_parameters()}
    amp.apply(model, "fp32")
    assert {name: (type(m), dict(vars(m))) for name, m in model.named_modules()} == before
    assert {name: (id(p), p.data_ptr(), p.grad_dtype) for name, p in model.named_parameters()} == weights


def test_an_fp64_model_stays_one() -> None:
    model = small().double()
    amp.apply(model, "fp32")
    assert model(torch.randn(2, 8, dtype=torch.float64)).dtype == torch.float64


@pytest.mark.parametrize("master_weights", ["fp32", "split24", "none"])
@pytest.mark.parametrize("accumulated", [False, True])
def test_dtypes_of_everything(master_weights: str, accumulated: bool) -> None:
    model = small()
    parameters, keys = list(model.parameters()), list(model.state_dict())
    exact = copy.deepcopy(model)
    amp.apply(model, "bf16", master_weights=master_weights, accumulated=accumulated)
    x = torch.randn(5, 8)
    out = model(x)
    out.float().sum().backward()
    kept = torch.float32 if master_weights == "fp32" else torch.bfloat16
    assert out.dtype == torch.bfloat16
    assert [id(p) for p in model.parameters()] == [id(p) for p in parameters]
    assert list(model.state_dict()) == keys
    assert {p.dtype for p in parameters} == {kept}
    assert {p.grad.dtype for p in parameters if p.grad is not None} == {torch.float32 if accumulated else kept}
    torch.testing.assert_close(out.float(), exact(x), rtol=0.05, atol=0.02)


def test_bf16_weights_are_the_rounded_ones() -> None:
    model = small()
    expected = [p.detach().bfloat16() for p in model.parameters()]
    amp.apply(model, "bf16", master_weights="split24")
    assert all(torch.equal(p, e) for p, e in zip(model.parameters(), expected, strict=True))


def test_fp32_masters_and_bf16_weights_compute_the_same() -> None:
    """Rounded on use or rounded for good: the first step does not tell them apart."""
    model = small()
    twin = copy.deepcopy(model)
    amp.apply(model, "bf16")
    amp.apply(twin, "bf16", master_weights="none")
    x = torch.randn(5, 8)
    assert torch.equal(model(x), twin(x))


def test_weights_loaded_in_bf16_are_widened_to_be_masters() -> None:
    model = small().bfloat16()
    amp.apply(model, "bf16")
    assert {p.dtype for p in model.parameters()} == {torch.float32}


def test_applying_twice_is_applying_once() -> None:
    model = small()
    amp.apply(model, "bf16")
    kinds = [type(module) for module in model.modules()]
    amp.apply(model, "bf16")
    assert [type(module) for module in model.modules()] == kinds
    amp.apply(model, "fp32")
    assert [type(module) for module in model.modules()] == [type(module) for module in small().modules()]
    assert model(torch.randn(2, 8)).dtype == torch.float32


def test_applying_again_takes_back_how_gradients_are_summed() -> None:
    model = small()
    amp.apply(model, "bf16", master_weights="none", accumulated=True)
    assert {p.grad_dtype for p in model.parameters()} == {torch.float32}
    amp.apply(model, "bf16", master_weights="none")
    assert {p.grad_dtype for p in model.parameters()} == {torch.bfloat16}


def test_frozen_parameters_are_kept_like_the_others() -> None:
    model = small()
    model[0].requires_grad_(False)
    amp.apply(model, "bf16", master_weights="split24", accumulated=True)
    model(torch.randn(2, 8)).float().sum().backward()
    assert model[0].weight.dtype == torch.bfloat16
    assert model[0].weight.grad is None


@pytest.mark.parametrize(
    ("name", "master_weights", "message"),
    [
        ("fp16", "fp32", "amp.precision: fp16 does not run on the CPU; it can fp32 and bf16"),
        ("fp8", "fp32", "amp.precision: fp8 does not run on the CPU; it can fp32 and bf16"),
        ("fp32", "split24", "amp.master_weights: split24 keeps weights in bf16, and amp.precision is fp32"),
        ("fp32", "none", "amp.master_weights: none keeps weights in bf16, and amp.precision is fp32"),
    ],
)
def test_what_cannot_be_is_refused_before_anything_is_changed(name: str, master_weights: str, message: str) -> None:
    model = small()
    with pytest.raises(InputError, match=message):
        amp.apply(model, name, master_weights=master_weights)
    assert [type(module) for module in model.modules()] == [type(module) for module in small().modules()]
    assert {p.dtype for p in model.parameters()} == {torch.float32}


def test_fp16_keeps_fp32_masters(monkeypatch: pytest.MonkeyPatch) -> None:
    """The arithmetic, where torch has it on the CPU; a recipe is refused there."""
    monkeypatch.setattr(precisions, "device_fault", lambda *_: None)
    model = small()
    amp.apply(model, "fp16")
    out = model(torch.randn(3, 8))
    out.float().sum().backward()
    assert out.dtype == torch.float16
    assert {p.grad.dtype for p in model.parameters() if p.grad is not None} == {torch.float32}


@FAMILIES
@pytest.mark.parametrize("master_weights", ["fp32", "split24"])
def test_transformers_models_train(family: Callable[[], Any], master_weights: str) -> None:
    model = family()
    exact = copy.deepcopy(model)
    tied = model.get_output_embeddings().weight is model.get_input_embeddings().weight
    keys, buffers = list(model.state_dict()), {name: b.dtype for name, b in model.named_buffers()}
    amp.apply(model, "bf16", master_weights=master_weights)
    ids = torch.randint(3, 60, (2, 12))
    found, expected = model(input_ids=ids, labels=ids), exact(input_ids=ids, labels=ids)
    found.loss.backward()
    expected.loss.backward()
    assert found.loss.dtype == torch.float32
    assert (model.get_output_embeddings().weight is model.get_input_embeddings().weight) == tied
    assert list(model.state_dict()) == keys
    assert {name: b.dtype for name, b in model.named_buffers()} == buffers
    torch.testing.assert_close(found.loss, expected.loss, rtol=2e-3, atol=0)
    kept = torch.float32 if master_weights == "fp32" else torch.bfloat16
    assert {p.grad.dtype for p in model.parameters() if p.grad is not None} == {kept}
    mine, theirs = (flat([p.grad for p in m.parameters()]) for m in (model, exact))
    assert float((mine - theirs).norm() / theirs.norm()) < 0.02


@FAMILIES
@pytest.mark.parametrize("master_weights", ["fp32", "split24"])
def test_what_transformers_models_keep_is_low_precision(family: Callable[[], Any], master_weights: str) -> None:
    """But for row statistics, attention's log-sums and the loss; and no weight is copied."""
    model = family()
    amp.apply(model, "bf16", master_weights=master_weights)
    own = {p.untyped_storage().data_ptr() for p in model.parameters()}
    shapes = {tuple(p.shape) for p in model.parameters()} | {tuple(p.shape[::-1]) for p in model.parameters()}
    kept: list[Tensor] = []
    ids = torch.randint(3, 60, (3, 12))
    with torch.autograd.graph.saved_tensors_hooks(lambda tensor: kept.append(tensor) or tensor, lambda tensor: tensor):
        model(input_ids=ids, labels=ids)
    others = [t for t in kept if t.is_floating_point() and t.untyped_storage().data_ptr() not in own]
    assert not [t.shape for t in others if tuple(t.shape) in shapes]
    statistics, attention, loss = (3, 12, 1), (3, 2, 12), {(), (36, 60)}
    assert {tuple(t.shape) for t in others if t.dtype == torch.float32} <= {statistics, attention} | loss


def test_generation_and_evaluation_need_no_context() -> None:
    model = gpt2()
    amp.apply(model, "bf16")
    model.eval()
    with torch.no_grad():
        assert model(input_ids=torch.tensor([[4, 5, 6]])).logits.dtype == torch.float32
    ids = model.generate(torch.tensor([[4, 5, 6]]), attention_mask=torch.ones(1, 3), max_new_tokens=3, do_sample=False)
    assert ids.shape[1] <= 6


@pytest.mark.gpu
@pytest.mark.parametrize("name", ["bf16", "fp16"])
@FAMILIES
def test_cuda_trains_transformers_models(name: str, family: Callable[[], Any]) -> None:
    model = family().cuda()
    exact = copy.deepcopy(model)
    amp.apply(model, name)
    ids = torch.randint(3, 60, (2, 12), device="cuda")
    found, expected = model(input_ids=ids, labels=ids), exact(input_ids=ids, labels=ids)
    found.loss.backward()
    torch.testing.assert_close(found.loss, expected.loss, rtol=2e-3, atol=0)
    assert {p.grad.dtype for p in model.parameters() if p.grad is not None} == {torch.float32}
