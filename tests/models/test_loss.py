"""The chunked loss equals plain cross-entropy, and so do its gradients."""

from __future__ import annotations

from functools import partial

import pytest
import torch
import torch.nn.functional as F
from torch.utils._python_dispatch import TorchDispatchMode

from bigtrain.batch import IGNORED_LABEL
from bigtrain.models import loss as loss_module
from bigtrain.models.lookup import Lookup
from bigtrain.models.loss import linear_cross_entropy, score
from tests.shared.beside_blocks import measure_beside_blocks

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


def test_a_chunk_holds_nothing_of_the_one_before(torch_seed, monkeypatch):
    """Of products in bf16, whose slopes are a copy: three chunks hold as much as one, but for the sums over chunks."""
    monkeypatch.setattr(loss_module, "widened", lambda _: False)

    def peak(count):
        hidden, weight, bias, labels = inputs(count, torch.bfloat16)
        run = partial(linear_cross_entropy, hidden, weight, bias, labels, vocab_size=VOCABULARY, chunk_tokens=256)
        run()
        return measure_beside_blocks(run).peak_bytes - hidden.nbytes

    rows = 256 * PADDED
    assert abs(peak(3 * 256) - peak(256)) < 0.1 * rows * 2


def test_no_gradient_is_computed_without_need(torch_seed):
    tensors = inputs(64)
    with torch.no_grad(), Shapes() as shapes:
        value = linear_cross_entropy(*tensors, vocab_size=VOCABULARY, chunk_tokens=16)
    products = [name for name in shapes.names if name.startswith(("mm", "addmm"))]
    assert len(products) == 4
    assert not value.requires_grad
    torch.testing.assert_close(value, plain(*tensors).detach(), rtol=1e-6, atol=1e-7)


def test_bf16_hidden_states_make_bf16_products_and_the_rest_is_fp32(torch_seed):
    hidden, weight, bias, labels = inputs(64)
    half = hidden.detach().bfloat16().requires_grad_()
    found, found_grads = gradients(linear_cross_entropy, (half, weight, bias, labels), vocab_size=VOCABULARY)
    rounded = [tensor.detach().bfloat16().float().requires_grad_() for tensor in (hidden, weight)]
    right, right_grads = gradients(plain, (*rounded, bias, labels))
    assert found.dtype == torch.float32
    assert [grad.dtype for grad in found_grads] == [torch.bfloat16, torch.float32, torch.float32]
    torch.testing.assert_close(found, right, rtol=5e-3, atol=5e-3)
    for found_grad, right_grad in zip(found_grads, right_grads, strict=True):
        torch.testing.assert_close(found_grad.float(), right_grad, rtol=5e-2, atol=5e-3)


@pytest.mark.parametrize("slow", (True, False))
def test_widened_products_give_what_the_processors_own_give(torch_seed, monkeypatch, slow):
    hidden, weight, bias, labels = inputs(64)
    tensors = tuple(tensor.detach().bfloat16().requires_grad_() for tensor in (hidden, weight, bias))
    monkeypatch.setattr(loss_module, "widened", lambda tensor: slow and tensor.dtype == torch.bfloat16)
    found, found_grads = gradients(linear_cross_entropy, (*tensors, labels), vocab_size=VOCABULARY, chunk_tokens=20)
    right, right_grads = gradients(plain, (*(tensor.detach().float().requires_grad_() for tensor in tensors), labels))
    total, _, count = score(*(tensor.detach() for tensor in tensors), labels, vocab_size=VOCABULARY)
    torch.testing.assert_close(found, right, rtol=5e-3, atol=5e-3)
    torch.testing.assert_close(total / count, right, rtol=5e-3, atol=5e-3)
    for found_grad, right_grad in zip(found_grads, right_grads, strict=True):
        torch.testing.assert_close(found_grad.float(), right_grad, rtol=5e-2, atol=5e-3)


def some_ignored(labels):
    """Return the labels with about a third that do not count, and where the others are."""
    labels = labels.where(torch.rand(labels.shape) > 0.3, IGNORED_LABEL)
    return labels, (labels != IGNORED_LABEL).nonzero()[:, 0]


@pytest.mark.parametrize("dtype", TOLERANCE)
@pytest.mark.parametrize("bias", (True, False))
@pytest.mark.parametrize(("z_loss", "label_smoothing"), [(0.0, 0.0), (1e-2, 0.0), (0.0, 0.1), (1e-2, 0.2)])
@pytest.mark.parametrize("chunk", (1, 20, 1000))
def test_ignored_labels_are_as_labels_that_are_not_there(torch_seed, dtype, bias, z_loss, label_smoothing, chunk):
    hidden, weight, bias, labels = inputs(48, dtype, bias)
    labels, at = some_ignored(labels)
    options = {"z_loss": z_loss, "label_smoothing": label_smoothing}

    def gathered(hidden, weight, bias, labels):
        return plain(hidden[at], weight, bias, labels[at], **options)

    tensors = (hidden, weight, bias, labels)
    found, found_grads = gradients(linear_cross_entropy, tensors, vocab_size=VOCABULARY, chunk_tokens=chunk, **options)
    right, right_grads = gradients(gathered, tensors)
    torch.testing.assert_close(found, right, **TOLERANCE[dtype])
    torch.testing.assert_close(found_grads, right_grads, **TOLERANCE[dtype])
    assert not found_grads[0][labels == IGNORED_LABEL].any()
    assert not found_grads[1][VOCABULARY:].any()


def test_where_no_label_counts_the_loss_and_its_gradients_are_zero(torch_seed):
    hidden, weight, bias, labels = inputs(20)
    value = linear_cross_entropy(
        hidden, weight, bias, torch.full_like(labels, IGNORED_LABEL), vocab_size=VOCABULARY, label_smoothing=0.1
    )
    value.backward()
    assert value.item() == 0.0
    assert not any(tensor.grad.any() for tensor in (hidden, weight, bias))
    nothing = score(hidden, weight, bias, torch.full_like(labels, IGNORED_LABEL), vocab_size=VOCABULARY)
    assert [value.item() for value in nothing] == [0.0, 0, 0]


@pytest.mark.parametrize("wrong", (-1, -101, PADDED))
def test_only_one_number_below_zero_is_no_label(torch_seed, wrong):
    hidden, weight, bias, labels = inputs(20)
    labels[3] = wrong
    for function in (linear_cross_entropy, score):
        with pytest.raises((RuntimeError, IndexError), match="out of bounds"):
            function(hidden, weight, bias, labels, vocab_size=VOCABULARY)


def test_a_lookup_gets_the_gradient_of_the_weight(torch_seed):
    tensors, lookup = inputs(20), Lookup()
    right = torch.autograd.grad(linear_cross_entropy(*tensors, vocab_size=VOCABULARY), tensors[:3])
    linear_cross_entropy(*tensors, vocab_size=VOCABULARY, lookup=lookup).backward()
    hidden, weight, bias, _ = tensors
    assert weight.grad is None
    torch.testing.assert_close((hidden.grad, lookup.gradient, bias.grad), right)


def test_a_lookup_gets_nothing_of_a_frozen_weight(torch_seed):
    hidden, weight, bias, labels = inputs(20)
    lookup = Lookup()
    linear_cross_entropy(
        hidden, weight.requires_grad_(False), bias, labels, vocab_size=VOCABULARY, lookup=lookup
    ).backward()
    assert lookup.gradient is None
    assert hidden.grad.any()


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


def test_score_leaves_out_ignored_labels(torch_seed):
    hidden, weight, bias, labels = inputs(48)
    with torch.no_grad():
        labels[::2] = F.linear(hidden, weight, bias)[:, :VOCABULARY].argmax(1)[::2]
    labels, at = some_ignored(labels)
    found = score(hidden, weight, bias, labels, vocab_size=VOCABULARY, chunk_tokens=20)
    right = score(hidden[at], weight, bias, labels[at], vocab_size=VOCABULARY)
    torch.testing.assert_close(found, right, rtol=1e-6, atol=1e-6)
    assert found[2].item() == len(at)


def test_score_of_an_ignored_label_is_not_right_by_chance(torch_seed):
    """Column 0, which is read for it, may be the highest."""
    hidden, weight, _, _ = inputs(8, bias=False)
    with torch.no_grad():
        weight[0] = 1000 * hidden[0]
    labels = torch.full((8,), IGNORED_LABEL)
    assert [value.item() for value in score(hidden, weight, None, labels, vocab_size=VOCABULARY)] == [0.0, 0, 0]


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
