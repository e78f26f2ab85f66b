"""What attention costs against profiles of it: in place, composed for dropout, of one document and of several."""

from __future__ import annotations

import dataclasses

import pytest
import torch
from torch import Tensor

from bigtrain.ledger import Ledger, Value
from bigtrain.models.attention import Documents, attend
from bigtrain.models.attention_cost import Attention, document_places
from bigtrain.models.operations_cost import Numbers, Operations
from bigtrain.processor import has_slow_bf16
from tests.shared.beside_blocks import measure_beside_blocks

DIM = 16


def numbers_of(precision: str) -> Numbers:
    return Numbers(2, 4, 4, widened=has_slow_bf16()) if precision == "bf16" else Numbers()


def predicted(attention: Attention) -> int:
    ledger = attention.operations.ledger
    rows = attention.heads[0] + 2 * attention.heads[1]
    start = ledger.hold(attention.tokens * rows * DIM * attention.operations.numbers.activation)
    x = ledger.made(start, [], ledger.keep([]), lambda grad, kept: pytest.fail("the input has no more parents"))
    ledger.nodes.clear()
    before = ledger.now
    out = attention(x)
    gradient = ledger.hold(out.size)
    ledger.backward(out, gradient, lambda name, storage: None)
    return ledger.peak - before


def measured(attention: Attention, precision: str) -> int:
    heads, count = attention.heads, attention.tokens // attention.longest
    documents = Documents.of_lengths([attention.longest] * count)
    dtype = torch.bfloat16 if precision == "bf16" else torch.float32
    rows = heads[0] + 2 * heads[1]
    qkv = torch.randn(attention.tokens, rows, DIM, dtype=dtype, requires_grad=True)

    def step() -> Tensor:
        out = attend(qkv, heads, documents, causal=attention.causal, dropout=attention.dropout)
        out.backward(torch.ones_like(out))
        return out

    step()
    qkv.grad = None
    return measure_beside_blocks(step).peak_bytes


@pytest.mark.parametrize("dropout", [0.0, 0.1])
@pytest.mark.parametrize("causal", [False, True])
@pytest.mark.parametrize("heads", [(4, 4), (4, 2)], ids=str)
@pytest.mark.parametrize(("tokens", "longest"), [(256, 256), (256, 64), (800, 800)])
@pytest.mark.parametrize("precision", ["fp32", "bf16"])
def test_attention_holds_what_is_predicted(
    precision: str, tokens: int, longest: int, heads: tuple[int, int], causal: bool, dropout: float, torch_seed: int
) -> None:
    operations = Operations(Ledger(), numbers_of(precision), threads=torch.get_num_threads())
    attention = Attention(operations, heads, DIM, tokens, longest, causal, dropout)
    assert predicted(attention) == pytest.approx(measured(attention, precision), rel=0.005, abs=256)


def test_a_document_is_packed_in_bf16_or_widened() -> None:
    numbers = 256 * 4 * DIM
    sums, scores = 256 * 4 * 4, 64 * 256
    wide = (scores + 64 * (2 + DIM)) * 4
    packed = scores * 2 + 2 * numbers * 2 + 256 * DIM * 2
    peaks = []
    for widened in (False, True):
        ledger = Ledger()
        operations = Operations(ledger, Numbers(2, 4, 4, widened=widened))
        Attention(operations, (4, 4), DIM, 256, 256, False)(Value(ledger.hold(0), None))
        peaks.append(ledger.peak)
    assert peaks == [2 * numbers * 2 + sums + wide + packed, numbers * (2 + 4 * 4) + sums + wide]


def test_threads_have_room_of_their_own() -> None:
    peaks = []
    for threads in (1, 2, 3):
        operations = Operations(Ledger(), Numbers(), threads=threads)
        peaks.append(predicted(Attention(operations, (4, 4), DIM, 512, 512, False)))
    assert peaks[2] - peaks[1] == peaks[1] - peaks[0] > 0


def test_probabilities_are_kept_with_dropout_only() -> None:
    held = []
    for dropout in (0.0, 0.1):
        ledger = Ledger()
        attention = Attention(Operations(ledger, Numbers()), (4, 4), DIM, 512, 512, False, dropout)
        out = attention(Value(ledger.hold(512 * 12 * DIM * 4), None))
        held.append(ledger.now)
        del out
    assert held[1] - held[0] > 3 * 4 * 512 * 512 * 4 // 2


def test_on_a_gpu_one_kernel_serves_all_documents() -> None:
    ledger = Ledger()
    attention = Attention(Operations(ledger, Numbers(2, 4, 4), "cuda"), (4, 2), DIM, 512, 64, True)
    out = attention(Value(ledger.hold(0), None))
    assert ledger.now == out.size + 512 * 4 * 4


@pytest.mark.parametrize(("dim", "rounded"), [(16, 32), (64, 64), (80, 96), (160, 192)])
@pytest.mark.parametrize("heads", [(4, 4), (4, 2)], ids=str)
def test_on_a_gpu_the_backward_pass_adds_up_in_fp32(heads: tuple[int, int], dim: int, rounded: int) -> None:
    attention = Attention(Operations(Ledger(), Numbers(2, 4, 4), "cuda"), heads, dim, 512, 64, True, documents=8)
    rows = 512 + 128 * 8
    expanded = [512 * 4 * dim * 2] * 2 if heads == (4, 2) else []
    assert attention._accumulators() == [rows * 4 * 4, rows * 4 * rounded * 4, *expanded]
    assert not dataclasses.replace(attention, dropout=0.1)._accumulators()
    assert not dataclasses.replace(attention, operations=Operations(Ledger(), Numbers(), "cuda"))._accumulators()


def test_the_accumulators_are_part_of_the_peak() -> None:
    peaks = []
    for documents in (1, 2, 3):
        operations = Operations(Ledger(), Numbers(2, 4, 4), "cuda")
        peaks.append(predicted(Attention(operations, (4, 4), DIM, 512, 512, False, documents=documents)))
    assert peaks[2] - peaks[1] == peaks[1] - peaks[0] == 128 * 4 * (32 + 1) * 4


def test_rows_of_one_document_have_few_places() -> None:
    assert document_places(6, 512, packed=False) == 6
    assert [document_places(rows, 512, packed=True) for rows in (1, 4, 5, 32)] == [8, 8, 16, 64]
    assert [document_places(1, length, packed=True) for length in (128, 4096, 8192)] == [8, 16, 32]
