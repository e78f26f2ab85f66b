"""Cross-entropy over labelled positions, chunk by chunk: the full logits never exist, in either direction.

M labelled positions, C of them in a chunk, W width, V vocabulary, padded.
"""

from __future__ import annotations

from dataclasses import dataclass
from itertools import pairwise
from typing import Any

import torch
from torch import Tensor

from bigtrain.batch import IGNORED_LABEL
from bigtrain.models.lookup import Lookup
from bigtrain.models.shape import loss_chunk_tokens
from bigtrain.products import widened


@dataclass(frozen=True)
class Terms:
    """What the loss is made of: the vocabulary without its padding, and the two terms beside plain cross-entropy."""

    vocab_size: int
    z_loss: float = 0.0
    label_smoothing: float = 0.0


def linear_cross_entropy(
    hidden_MW: Tensor,
    weight_VW: Tensor,
    bias_V: Tensor | None,
    labels_M: Tensor,
    *,
    vocab_size: int,
    chunk_tokens: int | None = None,
    z_loss: float = 0.0,
    label_smoothing: float = 0.0,
    lookup: Lookup | None = None,
) -> Tensor:
    """Return the mean cross-entropy of the labels, fp32 (0 for no labels), under logits = hidden @ weight.T + bias.

    Labels of IGNORED_LABEL do not count. With a `lookup`, the weight's gradient goes to it, not to the weight: where
    the matrix is also the token embedding, the lookup adds its own rows and hands over one gradient instead of two.
    Columns from `vocab_size` on are padding: probability 0, gradient exactly 0. `z_loss` adds its multiple of the
    squared log-partition (Chowdhery et al. 2022, arXiv 2204.02311, section 5); `label_smoothing` moves that share of
    the target's probability to the whole vocabulary (Szegedy et al. 2015, arXiv 1512.00567, section 7).
    The gradients are made in the forward pass, of the same logits, and only when something needs them; so a second
    backward through one result raises RuntimeError. Products run in the hidden states' dtype; the softmax and the sum
    of the weight's gradient over chunks in fp32 (fp64 stays fp64).
    """
    chunk = chunk_tokens or loss_chunk_tokens(weight_VW.shape[0], hidden_MW.device.type)
    terms = Terms(vocab_size, z_loss, label_smoothing)
    loss: Tensor = _LinearCrossEntropy.apply(  # type: ignore[no-untyped-call]
        hidden_MW, weight_VW, bias_V, labels_M, terms, chunk, torch.is_grad_enabled(), lookup
    )
    return loss


@torch.no_grad()
def score(
    hidden_MW: Tensor,
    weight_VW: Tensor,
    bias_V: Tensor | None,
    labels_M: Tensor,
    *,
    vocab_size: int,
    chunk_tokens: int | None = None,
) -> tuple[Tensor, Tensor, Tensor]:
    """Return the sum of the plain cross-entropy (fp32), how many labels have the highest logit, and their number."""
    chunk = chunk_tokens or loss_chunk_tokens(weight_VW.shape[0], hidden_MW.device.type)
    weight_VW, buffer = _product_weight(hidden_MW, weight_VW), _buffer(hidden_MW, weight_VW, chunk)
    loss, correct = _zeros(hidden_MW), labels_M.new_zeros(())
    for rows in _chunks(labels_M.shape[0], chunk):
        logits_CV = _logits(hidden_MW[rows].to(weight_VW.dtype), weight_VW, bias_V, vocab_size, buffer)
        counted_C = labels_M[rows] != IGNORED_LABEL
        correct += (logits_CV.argmax(1) == labels_M[rows]).sum()
        target_C = logits_CV.gather(1, _targets(labels_M[rows]))[:, 0]
        loss += (logits_CV.logsumexp(1) - target_C).mul_(counted_C).sum()
    return loss, correct, (labels_M != IGNORED_LABEL).sum()


class _LinearCrossEntropy(torch.autograd.Function):
    """The loss with its gradients, which the forward pass leaves for the backward pass to scale."""

    @staticmethod
    def forward(
        ctx: Any,
        hidden_MW: Tensor,
        weight_VW: Tensor,
        bias_V: Tensor | None,
        labels_M: Tensor,
        terms: Terms,
        chunk: int,
        differentiable: bool,
        lookup: Lookup | None,
    ) -> Tensor:
        wanted = [differentiable and need for need in ctx.needs_input_grad[:3]]
        total, ctx.grads = _sum_and_gradients(hidden_MW, weight_VW, bias_V, labels_M, terms, chunk, wanted)
        ctx.dtypes = [hidden_MW.dtype, weight_VW.dtype, None if bias_V is None else bias_V.dtype]
        ctx.lookup = lookup
        # The mean is taken in the backward pass: taken in the slopes it would make them underflow in fp16.
        ctx.scale = 1 / (labels_M != IGNORED_LABEL).sum().clamp_(min=1).to(total.dtype)
        loss: Tensor = total * ctx.scale
        return loss

    @staticmethod
    def backward(ctx: Any, grad_loss: Tensor) -> tuple[Tensor | None, ...]:
        if ctx.grads is None:
            raise RuntimeError("the loss was differentiated twice; its gradients are used up by the first backward")
        factor, grads, ctx.grads = grad_loss * ctx.scale, ctx.grads, None
        hidden, weight, bias = (_scaled(grads, index, factor, dtype) for index, dtype in enumerate(ctx.dtypes))
        if ctx.lookup is not None and weight is not None:
            ctx.lookup.gradient, weight = weight, None
        return hidden, weight, bias, None, None, None, None, None


def _scaled(grads: list[Tensor | None], index: int, factor: Tensor, dtype: torch.dtype) -> Tensor | None:
    """Take a gradient off the list, scaled in place and in its weight's dtype."""
    grad, grads[index] = grads[index], None
    return None if grad is None else grad.mul_(factor).to(dtype)


def _sum_and_gradients(
    hidden_MW: Tensor,
    weight_VW: Tensor,
    bias_V: Tensor | None,
    labels_M: Tensor,
    terms: Terms,
    chunk: int,
    wanted: list[bool],
) -> tuple[Tensor, list[Tensor | None]]:
    """Return the sum of the loss over the labels, and its gradients: the hidden states' in their own dtype."""
    sum_dtype = _sum_dtype(hidden_MW)
    grad_hidden = torch.empty_like(hidden_MW) if wanted[0] else None
    grad_weight = torch.zeros_like(weight_VW, dtype=sum_dtype) if wanted[1] else None
    grad_bias = torch.zeros_like(bias_V, dtype=sum_dtype) if wanted[2] and bias_V is not None else None
    total = _zeros(hidden_MW)
    product_weight_VW, buffer = _product_weight(hidden_MW, weight_VW), _buffer(hidden_MW, weight_VW, chunk)
    for rows in _chunks(labels_M.shape[0], chunk):
        hidden_CW = hidden_MW[rows].to(product_weight_VW.dtype)
        logits_CV = _logits(hidden_CW, product_weight_VW, bias_V, terms.vocab_size, buffer)
        total += _chunk_sum(logits_CV, labels_M[rows], terms, gradient=any(wanted))
        slopes_CV = logits_CV.to(hidden_CW.dtype)
        if grad_hidden is not None:
            grad_hidden[rows] = slopes_CV @ product_weight_VW
        if grad_weight is not None:
            _add_product(grad_weight, slopes_CV, hidden_CW, first=rows.start == 0)
        if grad_bias is not None:
            grad_bias += logits_CV.sum(0)
        del slopes_CV  # before the next chunk's product
    return total, [grad_hidden, grad_weight, grad_bias]


def _chunks(total: int, longest: int) -> list[slice]:
    """Cut the positions into the fewest chunks, evenly: a short last one would cost a pass over the weight as well."""
    count = -(-total // longest)
    bounds = [total * index // count for index in range(count)] + [total]
    return [slice(start, stop) for start, stop in pairwise(bounds)]


def _buffer(hidden_MW: Tensor, weight_VW: Tensor, chunk: int) -> Tensor:
    """Return the room that every chunk's logits reuse."""
    rows = min(chunk, hidden_MW.shape[0])
    return torch.empty(rows, weight_VW.shape[0], dtype=_sum_dtype(hidden_MW), device=hidden_MW.device)


def _logits(hidden_CW: Tensor, weight_VW: Tensor, bias_V: Tensor | None, vocab_size: int, buffer: Tensor) -> Tensor:
    """Return the logits in the buffer, in fp32 (fp64 stays), with -inf in the padded columns."""
    logits_CV = buffer[: hidden_CW.shape[0]]
    if hidden_CW.dtype == buffer.dtype:
        torch.mm(hidden_CW, weight_VW.T, out=logits_CV)
    else:
        logits_CV.copy_(hidden_CW @ weight_VW.T)
    if bias_V is not None:
        logits_CV += bias_V
    logits_CV[:, vocab_size:] = -torch.inf
    return logits_CV


def _chunk_sum(logits_CV: Tensor, labels_C: Tensor, terms: Terms, *, gradient: bool) -> Tensor:
    """Return the sum of the chunk's losses; with `gradient`, leave its slopes where the logits were."""
    index_C1, smoothing = _targets(labels_C), terms.label_smoothing
    counted_C1 = (labels_C != IGNORED_LABEL).to(logits_CV.dtype)[:, None]
    expected_C = logits_CV.gather(1, index_C1)[:, 0]
    if smoothing:
        expected_C = expected_C.lerp(logits_CV[:, : terms.vocab_size].mean(1), smoothing)
    highest_C1 = logits_CV.amax(1, keepdim=True)
    logits_CV.sub_(highest_C1).exp_()
    normalizer_C1 = logits_CV.sum(1, keepdim=True)
    partition_C = (normalizer_C1.log() + highest_C1)[:, 0]
    total = (partition_C - expected_C + terms.z_loss * partition_C.square()).mul_(counted_C1[:, 0]).sum()
    if gradient:
        logits_CV.mul_((1 + 2 * terms.z_loss * partition_C)[:, None] / normalizer_C1 * counted_C1)
        if smoothing:
            logits_CV[:, : terms.vocab_size] -= counted_C1 * (smoothing / terms.vocab_size)
        logits_CV.scatter_add_(1, index_C1, counted_C1 * (smoothing - 1))
    return total


def _targets(labels_C: Tensor) -> Tensor:
    """Return the columns of the labels, (C, 1); a label that does not count reads column 0, any other is itself."""
    return labels_C.masked_fill(labels_C == IGNORED_LABEL, 0)[:, None]


def _add_product(grad_VW: Tensor, slopes_CV: Tensor, hidden_CW: Tensor, *, first: bool) -> None:
    """Add slopes.T @ hidden in place, without a copy when the dtypes agree; the first of the chunks overwrites."""
    if grad_VW.dtype != slopes_CV.dtype:
        grad_VW += slopes_CV.T @ hidden_CW
    elif first:
        torch.mm(slopes_CV.T, hidden_CW, out=grad_VW)
    else:
        grad_VW.addmm_(slopes_CV.T, hidden_CW)


def _product_weight(hidden_MW: Tensor, weight_VW: Tensor) -> Tensor:
    """Return the weight as the products read it: rounded to the hidden states' dtype, and widened where they are."""
    rounded_VW = weight_VW.to(hidden_MW.dtype)
    return rounded_VW.float() if widened(hidden_MW) else rounded_VW


def _sum_dtype(tensor: Tensor) -> torch.dtype:
    return torch.float64 if tensor.dtype == torch.float64 else torch.float32


def _zeros(hidden: Tensor) -> Tensor:
    return torch.zeros((), dtype=_sum_dtype(hidden), device=hidden.device)
