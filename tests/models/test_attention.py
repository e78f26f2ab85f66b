"""Attention by document equals attention under a block-diagonal mask; the fused path is chosen where it holds."""

from __future__ import annotations

import inspect
from dataclasses import dataclass

import pytest
import torch
import torch.nn.functional as F

from bigtrain.models import attention
from bigtrain.models.attention import Documents, attend, attend_per_document, attention_path

LENGTHS = ([5], [4, 4, 4], [1, 7, 7, 2, 7], [3, 1, 1, 1, 9], [0, 6, 0, 0, 6, 2, 0])


def rows(lengths, heads=4, shared=4, dim=8, **options):
    total = sum(lengths)
    return [torch.randn(total, count, dim, requires_grad=True, **options) for count in (heads, shared, shared)]


def masked(q, k, v, lengths, causal):
    """Attend over the whole row under a mask that is true inside documents."""
    document = torch.repeat_interleave(torch.arange(len(lengths)), torch.tensor(lengths))
    mask = document[:, None] == document
    if causal:
        mask = mask.tril()
    k, v = (tensor.repeat_interleave(q.shape[1] // k.shape[1], 1) for tensor in (k, v))
    q, k, v = (tensor.transpose(0, 1) for tensor in (q, k, v))
    return F.scaled_dot_product_attention(q, k, v, attn_mask=mask).transpose(0, 1)


@pytest.mark.parametrize("lengths", LENGTHS, ids=str)
@pytest.mark.parametrize("causal", (True, False))
@pytest.mark.parametrize("shared", (1, 2, 4))
def test_equals_a_masked_row(torch_seed, lengths, causal, shared):
    tensors = rows(lengths, shared=shared)
    found = attend(*tensors, Documents.of_lengths(lengths), causal=causal, dropout=0.0)
    right = masked(*tensors, lengths, causal)
    torch.testing.assert_close(found, right, rtol=1e-5, atol=1e-6)
    slopes = torch.randn_like(found)
    found_grads = torch.autograd.grad(found, tensors, slopes)
    right_grads = torch.autograd.grad(right, tensors, slopes)
    torch.testing.assert_close(found_grads, right_grads, rtol=1e-4, atol=1e-6)


def test_views_of_one_fused_tensor_serve(torch_seed):
    lengths = [4, 4, 3]
    fused = torch.randn(11, 12, 8)
    parts = fused.split([4, 4, 4], dim=1)
    documents = Documents.of_lengths(lengths)
    found = attend(*parts, documents, causal=True, dropout=0.0)
    assert torch.equal(found, attend(*(part.contiguous() for part in parts), documents, causal=True, dropout=0.0))


def test_an_empty_row_gives_an_empty_row():
    tensors = rows([])
    assert attend(*tensors, Documents.of_lengths([]), causal=True, dropout=0.0).shape == (0, 4, 8)


def test_dropout_acts_on_probabilities(torch_seed):
    tensors = rows([6, 6])
    documents = Documents.of_lengths([6, 6])
    kept = attend(*tensors, documents, causal=False, dropout=0.0)
    mean = torch.stack([attend(*tensors, documents, causal=False, dropout=0.5) for _ in range(400)]).mean(0)
    assert not torch.equal(kept, attend(*tensors, documents, causal=False, dropout=0.5))
    torch.testing.assert_close(mean, kept, rtol=0, atol=0.25)


def test_documents_are_read_from_boundaries():
    boundaries = torch.tensor([0, 3, 3, 8, 13], dtype=torch.int32)
    documents = Documents(boundaries)
    assert documents.lengths == [3, 0, 5, 5]
    assert documents.max_seqlen == 5
    assert documents.runs == [(1, 3), (2, 5)]
    assert documents.cu_seqlens is boundaries
    assert not documents.fused


def test_documents_of_lengths_equal_those_of_boundaries():
    made = Documents.of_lengths([3, 5, 5])
    read = Documents(made.cu_seqlens)
    assert made.cu_seqlens.tolist() == [0, 3, 8, 13]
    assert made.cu_seqlens.dtype == torch.int32
    assert (made.lengths, made.runs, made.max_seqlen) == (read.lengths, read.runs, read.max_seqlen)


def test_a_given_longest_length_spares_reading_the_boundaries():
    documents = Documents(torch.empty(3, dtype=torch.int32, device="meta"), max_seqlen=7)
    assert documents.max_seqlen == 7


@pytest.mark.parametrize("dtype", (torch.float16, torch.bfloat16))
@pytest.mark.parametrize("head_dim", (8, 64, 128, 256))
def test_the_fused_kernel_is_chosen_where_it_holds(dtype, head_dim):
    assert attention_path(True, dtype, head_dim, 0.0) == "varlen"


@pytest.mark.parametrize(
    ("fused", "dtype", "head_dim", "dropout"),
    [
        (False, torch.bfloat16, 64, 0.0),
        (True, torch.float32, 64, 0.0),
        (True, torch.float64, 64, 0.0),
        (True, torch.bfloat16, 64, 0.1),
        (True, torch.bfloat16, 320, 0.0),
        (True, torch.bfloat16, 20, 0.0),
    ],
)
def test_the_path_by_document_is_chosen_otherwise(fused, dtype, head_dim, dropout):
    assert attention_path(fused, dtype, head_dim, dropout) == "per_document"


@pytest.mark.parametrize(
    ("capability", "available"), [((7, 5), False), ((8, 0), True), ((9, 0), True), ((12, 0), True)]
)
def test_the_kernel_needs_an_ampere(monkeypatch, capability, available):
    monkeypatch.setattr(torch.cuda, "get_device_capability", lambda device: capability)
    assert attention.varlen_available(torch.device("cuda")) == available
    assert not attention.varlen_available(torch.device("cpu"))


def test_the_kernel_needs_a_torch_that_has_it(monkeypatch):
    monkeypatch.setattr(torch.cuda, "get_device_capability", lambda device: (9, 0))
    monkeypatch.setattr(attention, "varlen_attn", None)
    assert not attention.varlen_available(torch.device("cuda"))


@dataclass
class Call:
    """Stands for torch's function, with the parameters of one version, and remembers its call."""

    parameters: tuple[str, ...]

    def __call__(self, q, k, v, cu_q, cu_k, max_q, max_k, **options):
        self.options, self.heads, self.longest = options, k.shape[1], (max_q, max_k)
        documents = Documents(cu_q)
        causal = options.get("is_causal", False) or options.get("window_size") == (-1, 0)
        return attend_per_document(q, k, v, documents, causal=causal, dropout=0.0)


@pytest.fixture(params=[("is_causal",), ("window_size",), ("window_size", "enable_gqa")], ids=str)
def kernel(request, monkeypatch):
    call = Call(request.param)
    monkeypatch.setattr(attention, "varlen_attn", call)
    monkeypatch.setattr(attention, "VARLEN_PARAMETERS", frozenset(call.parameters))
    return call


@pytest.mark.parametrize("causal", (True, False))
@pytest.mark.parametrize("shared", (2, 4))
def test_the_kernel_is_called_as_its_version_wants(torch_seed, kernel, causal, shared):
    tensors = rows([3, 5], shared=shared, dtype=torch.bfloat16)
    documents = Documents.of_lengths([3, 5])
    documents.fused = True
    found = attend(*tensors, documents, causal=causal, dropout=0.0)
    documents.fused = False
    right = attend(*tensors, documents, causal=causal, dropout=0.0)
    torch.testing.assert_close(found, right)
    assert kernel.longest == (5, 5)
    assert set(kernel.options) <= set(kernel.parameters)
    if "enable_gqa" in kernel.parameters and shared == 2:
        assert kernel.options["enable_gqa"] is True
        assert kernel.heads == 2
    else:
        assert kernel.heads == 4


def test_fp32_never_calls_the_kernel(torch_seed, kernel):
    tensors = rows([3, 5])
    documents = Documents.of_lengths([3, 5])
    documents.fused = True
    attend(*tensors, documents, causal=True, dropout=0.0)
    assert not hasattr(kernel, "options")


def test_the_installed_kernel_has_a_spelling_of_causal():
    parameters = set(inspect.signature(attention.varlen_attn).parameters)
    assert parameters & {"is_causal", "window_size"}
    assert parameters == attention.VARLEN_PARAMETERS


@pytest.mark.gpu
@pytest.mark.parametrize("dtype", (torch.float16, torch.bfloat16))
@pytest.mark.parametrize("causal", (True, False))
@pytest.mark.parametrize("shared", (2, 4))
def test_the_kernel_equals_the_path_by_document(torch_seed, dtype, causal, shared):
    lengths = [17, 64, 64, 1, 130]
    tensors = rows(lengths, shared=shared, dim=64, dtype=dtype, device="cuda")
    documents = Documents.of_lengths(lengths, "cuda")
    if not documents.fused:
        pytest.skip("this device has no such kernel")
    assert attention_path(documents.fused, dtype, 64, 0.0) == "varlen"
    found = attend(*tensors, documents, causal=causal, dropout=0.0)
    right = attend_per_document(*tensors, documents, causal=causal, dropout=0.0)
    torch.testing.assert_close(found, right, rtol=2e-2, atol=2e-2)
    slopes = torch.randn_like(found)
    torch.testing.assert_close(
        torch.autograd.grad(found, tensors, slopes), torch.autograd.grad(right, tensors, slopes), rtol=5e-2, atol=5e-2
    )
