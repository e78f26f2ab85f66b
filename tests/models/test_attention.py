"""Attention by document equals attention under a block-diagonal mask; the fused path is chosen where it holds."""

from __future__ import annotations

import inspect
from dataclasses import dataclass

import pytest
import torch
import torch.nn.functional as F
from torch._subclasses.fake_tensor import FakeTensorMode

from bigtrain.models import attention
from bigtrain.models.attention import Documents, attend, attend_in_place, attend_per_document, attention_path

CPU, CUDA = torch.device("cpu"), torch.device("cuda")
HEADS = 4
LENGTHS = ([5], [4, 4, 4], [1, 7, 7, 2, 7], [3, 1, 1, 1, 9], [0, 6, 0, 0, 6, 2, 0])


def fused(lengths, shared=4, dim=8, **options):
    """Return the queries, keys and values of documents, (N, H + 2K, D), with 4 query heads and `shared` others."""
    return torch.randn(sum(lengths), HEADS + 2 * shared, dim, requires_grad=True, **options)


def by_kind(qkv):
    """Return queries, keys and values, and the numbers of their heads."""
    shared = (qkv.shape[1] - HEADS) // 2
    return qkv.split([HEADS, shared, shared], dim=1), (HEADS, shared)


def run(qkv, documents, *, causal, dropout=0.0):
    return attend(qkv, by_kind(qkv)[1], documents, causal=causal, dropout=dropout)


def in_place(qkv, lengths, causal):
    return attend_in_place(qkv, by_kind(qkv)[1], Documents.of_lengths(lengths), causal)


def per_document(qkv, lengths, causal):
    return attend_per_document(*by_kind(qkv)[0], Documents.of_lengths(lengths), causal=causal, dropout=0.0)


def masked(qkv, lengths, causal):
    """Attend over the whole row under a mask that is true inside documents."""
    document = torch.repeat_interleave(torch.arange(len(lengths)), torch.tensor(lengths))
    mask = document[:, None] == document
    if causal:
        mask = mask.tril()
    (q, k, v), (heads, shared) = by_kind(qkv)
    k, v = (tensor.repeat_interleave(heads // shared, 1) for tensor in (k, v))
    q, k, v = (tensor.transpose(0, 1) for tensor in (q, k, v))
    return F.scaled_dot_product_attention(q, k, v, attn_mask=mask).transpose(0, 1)


def with_gradient(function, qkv, *rest):
    """Return what a function makes of the fused tensor, and the gradient under slopes that are always the same."""
    out = function(qkv, *rest)
    slopes = torch.randn(out.shape, dtype=torch.float64, generator=torch.Generator().manual_seed(1)).to(out.dtype)
    return out, *torch.autograd.grad(out, qkv, slopes)


@pytest.mark.parametrize("lengths", LENGTHS, ids=str)
@pytest.mark.parametrize("causal", (True, False))
@pytest.mark.parametrize("shared", (1, 2, 4))
@pytest.mark.parametrize("way", (in_place, per_document))
def test_equals_a_masked_row(torch_seed, way, lengths, causal, shared):
    qkv = fused(lengths, shared)
    found, right = (with_gradient(function, qkv, lengths, causal) for function in (way, masked))
    torch.testing.assert_close(found, right, rtol=1e-4, atol=1e-6)


@pytest.mark.parametrize("dtype", (torch.float32, torch.float64))
@pytest.mark.parametrize("causal", (True, False))
@pytest.mark.parametrize("shared", (1, 2, 4))
def test_in_place_equals_the_path_by_document(torch_seed, dtype, causal, shared):
    lengths = [3, 40, 40, 0, 1, 200, 17]
    qkv = fused(lengths, shared, dim=16, dtype=dtype)
    found, right = (with_gradient(function, qkv, lengths, causal) for function in (in_place, per_document))
    torch.testing.assert_close(found, right, rtol=1e-6, atol=1e-6)


@pytest.mark.parametrize("dtype", (torch.bfloat16, torch.float16))
@pytest.mark.parametrize("causal", (True, False))
def test_in_place_rounds_what_fp32_gives(torch_seed, dtype, causal):
    lengths = [9, 30, 30]
    qkv = fused(lengths, 2, dtype=dtype)
    found = with_gradient(in_place, qkv, lengths, causal)
    right = with_gradient(in_place, qkv.detach().float().requires_grad_(), lengths, causal)
    assert [tensor.dtype for tensor in found] == [dtype, dtype]
    for half, exact in zip(found, right, strict=True):
        torch.testing.assert_close(half.float(), exact, rtol=2e-2, atol=2e-2)


@pytest.mark.parametrize("causal", (True, False))
@pytest.mark.parametrize("shared", (1, 2, 4))
def test_in_place_has_the_right_derivatives(torch_seed, causal, shared):
    lengths = [2, 0, 3, 1, 3]
    qkv = fused(lengths, shared, dim=4, dtype=torch.float64)
    assert torch.autograd.gradcheck(lambda qkv: in_place(qkv, lengths, causal), (qkv,))


def test_in_place_keeps_what_came_what_left_and_a_number_for_each_token_and_head(torch_seed):
    lengths, shared = [5, 0, 7, 7], 2
    qkv, kept = fused(lengths, shared, dtype=torch.bfloat16), []
    with torch.autograd.graph.saved_tensors_hooks(lambda tensor: kept.append(tensor) or tensor, lambda tensor: tensor):
        out = in_place(qkv, lengths, True)
    first, second, *sums = kept
    assert first.data_ptr() == qkv.data_ptr()
    assert second.data_ptr() == out.data_ptr()
    assert [(tensor.numel(), tensor.dtype) for tensor in sums] == [
        (length * HEADS, torch.float32) for length in lengths if length
    ]
    assert [tensor.shape for tensor in (first, second)] == [(19, HEADS + 2 * shared, 8), (19, HEADS, 8)]


def test_the_gradient_is_the_only_large_tensor_of_the_backward_pass(torch_seed, allocations):
    lengths = [4] * 40
    qkv = fused(lengths)
    out = in_place(qkv, lengths, False)
    slopes = torch.randn_like(out)
    largest, second = sorted(allocations(lambda: torch.autograd.grad(out, qkv, slopes)))[:-3:-1]
    assert largest == qkv.nbytes
    assert second < qkv.nbytes / 10


STRANGE = {
    "heads inside": lambda: torch.randn(38, 8, 12).transpose(1, 2),
    "gaps": lambda: torch.randn(38, 12, 16)[..., ::2],
    "heads outside": lambda: torch.randn(12, 38, 8).transpose(0, 1),
}


@pytest.mark.parametrize("way", (in_place, per_document))
@pytest.mark.parametrize("layout", STRANGE)
def test_strides_do_not_matter(torch_seed, way, layout):
    strange = STRANGE[layout]()
    plain = strange.clone(memory_format=torch.contiguous_format)
    found, right = (with_gradient(way, qkv.requires_grad_(), [4, 4, 30], True) for qkv in (strange, plain))
    torch.testing.assert_close(found, right, rtol=1e-5, atol=1e-6)


@pytest.mark.parametrize("dropout", (0.0, 0.5))
@pytest.mark.parametrize("lengths", ([], [0, 0]), ids=str)
def test_an_empty_row_gives_an_empty_row(lengths, dropout):
    qkv = fused([])
    out = run(qkv, Documents.of_lengths(lengths), causal=True, dropout=dropout)
    assert out.shape == (0, 4, 8)
    out.sum().backward()
    assert qkv.grad.shape == (0, 12, 8)


def test_it_runs_on_fake_tensors():
    with FakeTensorMode():
        qkv = fused([5, 5, 3], 2)
        out = run(qkv, Documents.of_lengths([5, 5, 3]), causal=True)
        out.sum().backward()
    assert out.shape == (13, 4, 8)
    assert qkv.grad.shape == qkv.shape


def test_a_row_needs_no_gradient(torch_seed):
    qkv = fused([3, 4])
    documents = Documents.of_lengths([3, 4])
    with torch.no_grad():
        out = run(qkv, documents, causal=True)
    assert not out.requires_grad
    assert torch.equal(out, run(qkv, documents, causal=True))


def test_dropout_acts_on_probabilities(torch_seed):
    qkv, documents = fused([6, 6]), Documents.of_lengths([6, 6])
    kept = run(qkv, documents, causal=False)
    mean = torch.stack([run(qkv, documents, causal=False, dropout=0.5) for _ in range(400)]).mean(0)
    assert not torch.equal(kept, run(qkv, documents, causal=False, dropout=0.5))
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
    assert attention_path(CUDA, True, dtype, head_dim, 0.0) == "varlen"


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
def test_a_path_by_document_is_chosen_otherwise(fused, dtype, head_dim, dropout):
    assert attention_path(CUDA, fused, dtype, head_dim, dropout) == "per_document"
    assert attention_path(CPU, False, dtype, head_dim, dropout) == ("per_document" if dropout else "in_place")


@pytest.mark.parametrize(
    ("capability", "available"), [((7, 5), False), ((8, 0), True), ((9, 0), True), ((12, 0), True)]
)
def test_the_kernel_needs_an_ampere(monkeypatch, capability, available):
    monkeypatch.setattr(attention, "varlen_attn", object())
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
    qkv = fused([3, 5], shared, dtype=torch.bfloat16)
    documents = Documents.of_lengths([3, 5])
    documents.fused = True
    found = run(qkv, documents, causal=causal)
    torch.testing.assert_close(found, per_document(qkv, [3, 5], causal))
    assert kernel.longest == (5, 5)
    assert set(kernel.options) <= set(kernel.parameters)
    if "enable_gqa" in kernel.parameters and shared == 2:
        assert kernel.options["enable_gqa"] is True
        assert kernel.heads == 2
    else:
        assert kernel.heads == 4


def test_fp32_never_calls_the_kernel(torch_seed, kernel):
    documents = Documents.of_lengths([3, 5])
    documents.fused = True
    run(fused([3, 5]), documents, causal=True)
    assert not hasattr(kernel, "options")


def test_the_installed_kernel_has_a_spelling_of_causal():
    """It is loaded where there is a GPU."""
    varlen = pytest.importorskip("torch.nn.attention.varlen")
    parameters = set(inspect.signature(varlen.varlen_attn).parameters)
    assert parameters & {"is_causal", "window_size"}
    assert (parameters if torch.cuda.is_available() else set()) == attention.VARLEN_PARAMETERS


@pytest.mark.parametrize(
    ("dtype", "dim", "device"),
    [
        (torch.bfloat16, 64, "cpu"),
        *(
            pytest.param(dtype, dim, "cuda", marks=pytest.mark.gpu)
            for dtype in (torch.float16, torch.bfloat16)
            for dim in (64, 96, 128)
        ),
    ],
)
@pytest.mark.parametrize("causal", (True, False))
@pytest.mark.parametrize("shared", (2, 4))
def test_the_kernel_equals_the_path_by_document(torch_seed, dtype, dim, device, causal, shared):
    """Empty documents at the end, which fill boundaries up, change nothing; on the CPU no kernel is met."""
    lengths = [17, 64, 64, 1, 130, 0, 0, 0]
    qkv = fused(lengths, shared, dim=dim, dtype=dtype, device=device)
    documents = Documents.of_lengths(lengths, device)
    if device == "cuda":
        if not documents.fused:
            pytest.skip("this device has no such kernel")
        assert attention_path(qkv.device, documents.fused, dtype, dim, 0.0) == "varlen"
    found = run(qkv, documents, causal=causal)
    right = attend_per_document(*by_kind(qkv)[0], documents, causal=causal, dropout=0.0)
    torch.testing.assert_close(found, right, rtol=2e-2, atol=2e-2)
    slopes = torch.randn_like(found)
    found_grad, right_grad = (torch.autograd.grad(out, qkv, slopes)[0] for out in (found, right))
    torch.testing.assert_close(found_grad, right_grad, rtol=5e-2, atol=5e-2)
