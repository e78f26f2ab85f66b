"""The chunked loss equals plain cross-entropy, and so do its gradients."""

from __future__ import annotations

import pytest
import torch
import torch.nn.functional as F
from torch.utils._python_dispatch import TorchDispatchMode

from bigtrain.models import loss as loss_module
from bigtrain.models.loss import linear_cross_entropy, score

WIDTH, VOCABULARY, PADDED = 16, 100, 128
TOLERANCE = {torch.float32: {"rtol": 1e-6, "atol": 1e-7}, torch.float64: {"rtol": 1e-12, "atol": 1e-14}}


def inputs(count, dtype=torch.float32, bias=True):
    hidden = torch.randn(count, WIDTH, dtype=dtype, requires_grad=True)
    weight = torch.randn(PADDED, WIDTH, dtype=dtype, requires_grad=True)
    bias = torch.randn(PADDED, dtype=dtype, requires_grad=True) if bias else None
    return hidden, weight, bias, torch.randint(0, VOCABULARY, (count,))


def plain(hidden, weight, bias, labels, *, z_loss=0.0, label_smoothing=0.0):
    """The same loss with whole logits, as text books write it."""
    logits = F.linear(hidden, weight, bias)[:, :VOCABULARY]
    z = logits.logsumexp(1).square().mean()
    return F.cross_entropy(logits, labels, label_smoothing=label_smoothing) + z_loss * z


def gradients(function, tensors, **options):
    """Return the loss and the gradients; the loss is scaled first, as the engine does."""
    leaves = [tensor for tensor in tensors[:3] if tensor is not None]
    value = function(*tensors, **options)
    return value.detach(), torch.autograd.grad(value * 0.7, leaves)


@pytest.mark.parametrize("dtype", TOLERANCE)
@pytest.mark.parametrize("bias", (True, False))
@pytest.mark.parametrize(("z_loss", "label_smoothing"), [(0.0, 0.0), (1e-2, 0.0), (0.0, 0.1), (1e-2, 0.2)])
@pytest.mark.parametrize("chunk", (1, 16, 20, 1000))
def test_equals_plain_cross_entropy(torch_seed, dtype, bias, z_loss, label_smoothing, chunk):
    tensors = inputs(48, dtype, bias)
    options = {"z_loss": z_loss, "label_smoothing": label_smoothing}
    found, found_grads = gradients(linear_cross_entropy, tensors, vocab_size=VOCABULARY, chunk_tokens=chunk, **options)
    right, right_grads = gradients(plain, tensors, **options)
    torch.testing.assert_close(found, right, **TOLERANCE[dtype])
    for found_grad, right_grad in zip(found_grads, right_grads, strict=True):
        torch.testing.assert_close(found_grad, right_grad, **TOLERANCE[dtype])


@pytest.mark.skipif(not hasattr(F, "linear_cross_entropy"), reason="this torch has none")
def test_equals_the_one_of_torch(torch_seed):
    hidden, weight, bias, labels = inputs(40)
    weight = weight[:VOCABULARY].detach().requires_grad_()
    bias = bias[:VOCABULARY].detach().requires_grad_()
    tensors = (hidden, weight, bias, labels)

    def torchs(hidden, weight, bias, labels):
        return F.linear_cross_entropy(hidden, weight, labels, linear_bias=bias)

    found, found_grads = gradients(linear_cross_entropy, tensors, vocab_size=VOCABULARY, chunk_tokens=7)
    right, right_grads = gradients(torchs, tensors)
    torch.testing.assert_close(found, right, rtol=1e-6, atol=1e-7)
    torch.testing.assert_close(found_grads, right_grads, rtol=1e-6, atol=1e-7)


@pytest.mark.parametrize("label_smoothing", (0.0, 0.1))
def test_padded_columns_get_a_gradient_of_exactly_zero(torch_seed, label_smoothing):
    hidden, weight, bias, labels = inputs(30)
    options = {"z_loss": 1e-3, "label_smoothing": label_smoothing}
    linear_cross_entropy(hidden, weight, bias, labels, vocab_size=VOCABULARY, chunk_tokens=8, **options).backward()
    assert not weight.grad[VOCABULARY:].any()
    assert not bias.grad[VOCABULARY:].any()
    assert weight.grad[:VOCABULARY].any(1).all()


def test_padded_columns_do_not_change_the_loss(torch_seed):
    hidden, weight, bias, labels = inputs(30)
    before = linear_cross_entropy(hidden, weight, bias, labels, vocab_size=VOCABULARY)
    with torch.no_grad():
        weight[VOCABULARY:] *= 100
    assert torch.equal(linear_cross_entropy(hidden, weight, bias, labels, vocab_size=VOCABULARY), before)


def test_no_labels_are_a_loss_of_zero_with_gradients_of_zero():
    hidden, weight, bias, labels = inputs(0)
    value = linear_cross_entropy(hidden, weight, bias, labels, vocab_size=VOCABULARY)
    assert value.item() == 0.0
    value.backward()
    assert hidden.grad.shape == (0, WIDTH)
    assert not weight.grad.any()
    assert not bias.grad.any()


def test_the_scale_of_the_loss_reaches_the_gradients(torch_seed):
    tensors = inputs(10)
    value = linear_cross_entropy(*tensors, vocab_size=VOCABULARY)
    once = torch.autograd.grad(value, tensors[:3])
    twice = torch.autograd.grad(linear_cross_entropy(*tensors, vocab_size=VOCABULARY) * 2, tensors[:3])
    torch.testing.assert_close([2 * grad for grad in once], list(twice))


def test_a_second_backward_is_refused(torch_seed):
    value = linear_cross_entropy(*inputs(10), vocab_size=VOCABULARY)
    value.backward(retain_graph=True)
    with pytest.raises(RuntimeError, match="differentiated twice"):
        value.backward()


@pytest.mark.parametrize("frozen", (0, 1, 2))
def test_only_what_is_wanted_gets_a_gradient(torch_seed, frozen):
    tensors = inputs(20)
    tensors[frozen].requires_grad_(False)
    linear_cross_entropy(*tensors, vocab_size=VOCABULARY, chunk_tokens=6).backward()
    found = [tensor.grad for tensor in tensors[:3]]
    assert found[frozen] is None
    right = torch.autograd.grad(plain(*tensors), [tensor for tensor in tensors[:3] if tensor.requires_grad])
    torch.testing.assert_close([grad for grad in found if grad is not None], list(right), rtol=1e-6, atol=1e-7)


def test_extreme_logits_stay_finite(torch_seed):
    hidden, weight, bias, labels = inputs(20)
    value = linear_cross_entropy(hidden * 1e4, weight, bias, labels, vocab_size=VOCABULARY, chunk_tokens=6)
    value.backward()
    assert value.isfinite()
    assert hidden.grad.isfinite().all()


class Shapes(TorchDispatchMode):
    """Record the operations and the largest tensor that any of them returns."""

    def __init__(self):
        super().__init__()
        self.largest, self.names = 0, []

    def __torch_dispatch__(self, function, types, args=(), kwargs=None):
        result = function(*args, **(kwargs or {}))
        self.names.append(function.__name__)
        for tensor in result if isinstance(result, tuple) else (result,):
            if isinstance(tensor, torch.Tensor):
                self.largest = max(self.largest, tensor.numel())
        return result


def test_the_full_logits_never_exist(torch_seed):
    tensors = inputs(512)
    with Shapes() as shapes:
        linear_cross_entropy(*tensors, vocab_size=VOCABULARY, chunk_tokens=16).backward()
    assert shapes.largest == max(tensor.numel() for tensor in tensors[:2])


def test_no_gradient_is_computed_without_need(torch_seed):
    tensors = inputs(64)
    with torch.no_grad(), Shapes() as shapes:
        value = linear_cross_entropy(*tensors, vocab_size=VOCABULARY, chunk_tokens=16)
    products = [name for name in shapes.names if name.startswith(("mm", "addmm"))]
    assert len(products) == 4
    assert not value.requires_grad
    torch.testing.assert_close(value, plain(*tensors).detach(), rtol=1e-6, atol=1e-7)


def test_under_autocast_products_are_bf16_and_the_rest_fp32(torch_seed):
    tensors = inputs(64)
    right, right_grads = gradients(plain, tensors)
    with torch.autocast("cpu", torch.bfloat16):
        found, found_grads = gradients(linear_cross_entropy, tensors, vocab_size=VOCABULARY, chunk_tokens=20)
    assert found.dtype == torch.float32
    assert [grad.dtype for grad in found_grads] == [torch.float32] * 3
    torch.testing.assert_close(found, right, rtol=2e-2, atol=2e-2)
    torch.testing.assert_close(found_grads, right_grads, rtol=5e-2, atol=5e-3)
    hidden, weight, bias, labels = tensors
    rounded = plain(hidden.bfloat16().float(), weight.bfloat16().float(), bias, labels)
    torch.testing.assert_close(found, rounded.detach(), rtol=5e-3, atol=5e-3)


def test_bf16_inputs_get_bf16_gradients_that_were_summed_in_fp32(torch_seed):
    exact = inputs(512, bias=False)
    half = tuple(
        tensor.detach().bfloat16().requires_grad_() if tensor is not None and tensor.is_floating_point() else tensor
        for tensor in exact
    )
    _, right = gradients(
        plain,
        tuple(t.detach().float().requires_grad_() if t is not None and t.is_floating_point() else t for t in half),
    )
    value, found = gradients(linear_cross_entropy, half, vocab_size=VOCABULARY, chunk_tokens=4)
    assert value.dtype == torch.float32
    assert [grad.dtype for grad in found] == [torch.bfloat16] * 2
    torch.testing.assert_close([grad.float() for grad in found], list(right), rtol=5e-2, atol=2e-3)


def test_fp16_slopes_do_not_vanish_before_the_loss_scale(torch_seed):
    """Of 4,096 labels each has a share of 2.4e-4: times a probability, less than fp16 can hold."""
    hidden, weight, bias, labels = inputs(4096)
    value = linear_cross_entropy(hidden, weight * 0.01, bias.detach() * 0, labels, vocab_size=VOCABULARY)
    right = torch.autograd.grad(value, hidden)[0]
    half = weight.detach().half().mul(0.01).requires_grad_()
    value = linear_cross_entropy(hidden.half(), half, None, labels, vocab_size=VOCABULARY) * 65536
    found = torch.autograd.grad(value, hidden)[0] / 65536
    torch.testing.assert_close(found, right, rtol=0.05, atol=0.02 * right.abs().max().item())


@pytest.mark.parametrize("total", (0, 1, 5, 12, 13, 100))
@pytest.mark.parametrize("longest", (1, 4, 12, 1000))
def test_chunks_cover_every_position_once_and_evenly(total, longest):
    chunks = loss_module._chunks(total, longest)
    assert [position for chunk in chunks for position in range(chunk.start, chunk.stop)] == list(range(total))
    lengths = [chunk.stop - chunk.start for chunk in chunks]
    assert len(chunks) == -(-total // longest)
    assert max(lengths, default=0) <= longest
    assert max(lengths, default=0) - min(lengths, default=0) <= 1


@pytest.mark.parametrize("bias", (True, False))
@pytest.mark.parametrize("chunk", (1, 20, 1000))
def test_score_counts_and_sums(torch_seed, bias, chunk):
    hidden, weight, bias, labels = inputs(48, bias=bias)
    logits = F.linear(hidden, weight, bias)[:, :VOCABULARY]
    labels[::3] = logits.argmax(1)[::3]
    total, correct, count = score(hidden, weight, bias, labels, vocab_size=VOCABULARY, chunk_tokens=chunk)
    torch.testing.assert_close(total, F.cross_entropy(logits, labels, reduction="sum").detach(), rtol=1e-6, atol=1e-6)
    assert correct.item() == (logits.argmax(1) == labels).sum().item() >= 16
    assert count.item() == 48
    assert not total.requires_grad


def test_score_never_picks_a_padded_column(torch_seed):
    hidden, weight, _, _ = inputs(8, bias=False)
    with torch.no_grad():
        weight[VOCABULARY:] = 1000 * hidden[0]
    labels = torch.full((8,), VOCABULARY - 1)
    total, _, _ = score(hidden, weight, None, labels, vocab_size=VOCABULARY)
    assert total < 1000


def test_score_of_nothing():
    hidden, weight, bias, labels = inputs(0)
    assert [value.item() for value in score(hidden, weight, bias, labels, vocab_size=VOCABULARY)] == [0.0, 0, 0]
