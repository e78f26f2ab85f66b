"""One gradient of the matrix that is both the token embedding and the head."""

from __future__ import annotations

import gc

import pytest
import torch
import torch.nn.functional as F

from bigtrain.models import build_model
from bigtrain.models.lookup import Lookup

V, W = 50, 6
FAMILIES = ("bert", "gpt", "llama")


@pytest.fixture
def index(torch_seed):
    """Return indices of which many occur several times."""
    return torch.randint(0, 20, (40,))


def test_it_gives_the_rows(index):
    weight = torch.randn(V, W)
    assert torch.equal(Lookup()(index, weight), weight[index])
    assert Lookup()(index[:0], weight).shape == (0, W)


@pytest.mark.parametrize("dtype", (torch.float64, torch.float32, torch.bfloat16))
def test_alone_it_is_an_embedding(index, dtype):
    weight = torch.randn(V, W, dtype=dtype, requires_grad=True)
    slopes = torch.randn(40, W, dtype=dtype)
    (found,) = torch.autograd.grad(Lookup()(index, weight), weight, slopes)
    (right,) = torch.autograd.grad(F.embedding(index, weight.double()), weight, slopes.double())
    assert found.dtype == dtype
    torch.testing.assert_close(found, right)


def test_its_derivatives_are_right(index):
    weight = torch.randn(V, W, dtype=torch.float64, requires_grad=True)
    assert torch.autograd.gradcheck(lambda weight: Lookup()(index, weight), (weight,))


def test_it_adds_to_what_the_head_left_and_takes_it(index):
    weight, lookup = torch.randn(V, W, requires_grad=True), Lookup()
    rows = lookup(index, weight)
    slopes, left = torch.randn(40, W), torch.randn(V, W)
    lookup.gradient = left
    right = left.clone().index_add_(0, index, slopes)
    (found,) = torch.autograd.grad(rows, weight, slopes)
    torch.testing.assert_close(found, right)
    assert found.data_ptr() == left.data_ptr()
    assert lookup.gradient is None


def test_many_rows_of_one_token_are_summed_in_fp32(torch_seed):
    """Summed in bf16, 4,096 equal numbers would stop growing at 256 times the first."""
    weight = torch.zeros(V, W, dtype=torch.bfloat16, requires_grad=True)
    slopes = torch.ones(4096, W, dtype=torch.bfloat16)
    (found,) = torch.autograd.grad(Lookup()(torch.full((4096,), 7), weight), weight, slopes)
    assert found[7].tolist() == [4096.0] * W
    assert found.sum().item() == 4096.0 * W


@pytest.fixture(params=FAMILIES)
def pair(request, tiny, torch_seed):
    """Return a tied model, and an untied one with the same weights."""
    tied, untied = (build_model(tiny(request.param, tie_word_embeddings=tie)) for tie in (True, False))
    untied.load_state_dict({**tied.state_dict(), "decoder.weight": tied.tokens.weight})
    return tied, untied


def summed(untied):
    return untied.tokens.weight.grad + untied.decoder.weight.grad


def assert_equal_gradients(tied, untied, **tolerance):
    found = {name: parameter.grad for name, parameter in tied.named_parameters()}
    right = {name: parameter.grad for name, parameter in untied.named_parameters() if name != "decoder.weight"}
    right["tokens.weight"] = summed(untied)
    assert found.keys() == right.keys()
    for name, grad in found.items():
        torch.testing.assert_close(grad, right[name], **tolerance, msg=lambda text, name=name: f"{name}: {text}")


def test_the_gradient_is_the_sum_of_both_uses(pair, flat_row, documents):
    batch, losses = flat_row(documents), []
    for model in pair:
        losses.append(model(**batch))
        losses[-1].backward()
    assert torch.equal(*losses)
    assert_equal_gradients(*pair, rtol=1e-6, atol=1e-6)


def test_bf16_weights_get_a_bf16_gradient(pair, flat_row, documents):
    for model in pair:
        model.bfloat16()(**flat_row(documents)).backward()
    tied, untied = pair
    assert tied.tokens.weight.grad.dtype == torch.bfloat16
    assert_equal_gradients(tied, untied, rtol=2e-2, atol=2e-3)


def test_micro_batches_add_up(pair, flat_row, documents):
    for model in pair:
        for part in (documents[:3], documents[3:]):
            (model(**flat_row(part)) * 0.5).backward()
    assert_equal_gradients(*pair, rtol=1e-6, atol=1e-6)


def test_forwards_may_run_before_either_backward(pair, flat_row, documents):
    tied, untied = pair
    first, second = (tied(**flat_row(part)) for part in (documents[:3], documents[3:]))
    first.backward()
    second.backward()
    for part in (documents[:3], documents[3:]):
        untied(**flat_row(part)).backward()
    assert_equal_gradients(tied, untied, rtol=1e-6, atol=1e-6)


def test_one_backward_may_hold_two_forwards(pair, flat_row, documents):
    for model in pair:
        sum(model(**flat_row(part)) for part in (documents[:3], documents[3:])).backward()
    assert_equal_gradients(*pair, rtol=1e-6, atol=1e-6)


def test_a_row_without_labels_gives_gradients_of_zero(pair, flat_row, documents):
    tied, _ = pair
    tied(**flat_row(documents, [torch.full_like(document, -100) for document in documents])).backward()
    assert not tied.tokens.weight.grad.any()


def test_a_frozen_matrix_gets_no_gradient_and_the_others_theirs(pair, flat_row, documents):
    tied, untied = pair
    tied.tokens.weight.requires_grad_(False)
    for model in pair:
        model(**flat_row(documents)).backward()
    assert tied.tokens.weight.grad is None
    for name, parameter in tied.named_parameters():
        if name != "tokens.weight":
            torch.testing.assert_close(parameter.grad, untied.get_parameter(name).grad, rtol=1e-6, atol=1e-6)


def test_frozen_blocks_leave_the_gradient_whole(pair, flat_row, documents):
    for model in pair:
        model.blocks.requires_grad_(False)
        model(**flat_row(documents)).backward()
    tied, untied = pair
    torch.testing.assert_close(tied.tokens.weight.grad, summed(untied), rtol=1e-6, atol=1e-6)


def test_who_waits_for_the_gradient_gets_all_of_it_once(pair, flat_row, documents):
    tied, untied = pair
    untied(**flat_row(documents)).backward()
    seen = []
    tied.tokens.weight.register_post_accumulate_grad_hook(lambda weight: seen.append(weight.grad.clone()))
    tied(**flat_row(documents)).backward()
    assert len(seen) == 1
    torch.testing.assert_close(seen[0], summed(untied), rtol=1e-6, atol=1e-6)


def test_nothing_stays_behind(tiny, torch_seed, flat_row, documents, monkeypatch):
    """Neither what the head left nor the lookup outlives the backward pass."""
    model = build_model(tiny("gpt"))
    model(**flat_row(documents)).backward()
    gc.collect()
    assert not [found for found in gc.get_objects() if type(found) is Lookup]


def large(allocated, weight):
    """Follow how many tensors of the matrix's size live at a time: the most, and the last."""
    at_a_time = [0]
    for count in allocated:
        if abs(count) == weight.nbytes:
            at_a_time.append(at_a_time[-1] + (1 if count > 0 else -1))
    return max(at_a_time), at_a_time[-1]


@pytest.mark.parametrize("dtype", (torch.float32, torch.bfloat16))
def test_one_matrix_of_gradients_lives_where_autograd_would_hold_two(tiny, torch_seed, allocations, dtype):
    """After the head nothing of the size of V x W is allocated; with two matrices autograd makes a second."""
    length, counts = 20, {}
    batch = {
        "input_ids": torch.randint(0, 5000, (length,)),
        "position_ids": torch.arange(length),
        "cu_seqlens": torch.tensor([0, length], dtype=torch.int32),
        "labels": torch.randint(0, 5000, (length,)),
        "max_seqlen": length,
    }
    for tied in (True, False):
        model = build_model(tiny("gpt", vocab_size=5000, tie_word_embeddings=tied)).to(dtype)
        loss = model(**batch)
        counts[tied] = large(allocations(loss.backward), model.tokens.weight)
        assert model.tokens.weight.grad.dtype == dtype
    made = int(dtype == torch.bfloat16)  # the head's gradient, which in fp32 the forward pass has made already
    assert counts == {True: (made, made), False: (made + 1, made + 1)}


@pytest.mark.parametrize("device", ["cpu", pytest.param("cuda", marks=pytest.mark.gpu)])
@pytest.mark.parametrize("dtype", (torch.float32, torch.bfloat16))
def test_every_run_gives_the_same_bits(torch_seed, dtype, device):
    index = torch.randint(0, 20, (4096,), device=device)
    weight = torch.randn(V, 64, device=device, dtype=dtype, requires_grad=True)
    slopes, left = (torch.randn(count, 64, device=device, dtype=dtype) for count in (4096, V))
    found = []
    for _ in range(5):
        lookup = Lookup()
        rows = lookup(index, weight)
        lookup.gradient = left.clone()
        found.append(torch.autograd.grad(rows, weight, slopes)[0])
    assert all(torch.equal(grad, found[0]) for grad in found)
    right = left.double().index_add_(0, index, slopes.double())
    torch.testing.assert_close(found[0].double(), right, rtol=1e-2 if dtype == torch.bfloat16 else 1e-4, atol=1e-2)
