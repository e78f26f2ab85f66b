"""To which class of a step's time an operator or a kernel belongs, by its name and what it ran inside of.

A name decides alone for matrix products and attention. What can be part of anything, an addition or a copy, belongs to
what it ran inside of: our own loss, norms, lookups and attention, the optimizer, a compiled graph.
"""

from __future__ import annotations

import re
from collections.abc import Sequence
from functools import cache

import torch

from bigtrain.memory.measure import MARK
from bigtrain.planner.by_class import (
    ATTENTION,
    CALLS,
    COMMUNICATION,
    COPIES,
    DATA,
    ELEMENTWISE,
    EMBEDDING,
    FUSED,
    LOSS,
    MATRIX,
    MEMORY,
    NORMALIZATION,
    OPTIMIZER,
    OTHER,
)  # fmt: skip

STEP_MARK, DATA_MARK, BATCH_MARK = MARK + "step", MARK + "data", MARK + "batch"
FORWARD_MARK, BACKWARD_MARK, UPDATE_MARK = MARK + "forward", MARK + "backward", MARK + "update"
WAIT_MARK = MARK + "wait"
MARKS = (STEP_MARK, DATA_MARK, BATCH_MARK, FORWARD_MARK, BACKWARD_MARK, UPDATE_MARK, WAIT_MARK)
"""Parts of a step: the wait for its rows, cutting and moving them, the passes, the update; and the end of all."""


def _names(text: str) -> frozenset[str]:
    return frozenset(text.split())


PRODUCTS = _names(
    "mm addmm bmm baddbmm mv addmv dot vdot addr addbmm _addmm_activation _scaled_mm _int_mm _grouped_mm "
    "_scaled_grouped_mm mkldnn_linear linear_backward mkldnn_linear_backward"
)
FILLS = _names(
    "empty empty_like empty_strided empty_permuted new_empty new_empty_strided zeros zeros_like new_zeros ones "
    "ones_like new_ones full full_like new_full fill zero resize set arange scalar_tensor eye pin_memory _pin_memory "
    "randint rand randn"
)
DISPATCH = _names(
    "linear matmul einsum to type_as reshape reshape_as contiguous flatten unflatten ravel view view_as _unsafe_view "
    "_reshape_alias as_strided t numpy_T transpose permute movedim swapaxes expand expand_as squeeze unsqueeze select "
    "slice narrow split split_with_sizes unbind chunk tensor_split detach alias lift_fresh resolve_conj resolve_neg "
    "item _local_scalar_dense is_nonzero result_type promote_types can_cast unsafe_chunk unsafe_split view_as_real "
    "view_as_complex real T mT H mH diagonal _has_compatible_shallow_copy_type is_same_size is_pinned "
    "_is_all_true broadcast_tensors conj unfold pad dropout size stride numel dim _version output_nr "
    "_nested_tensor_size record_stream _conj sym_size"
)
"""Operators that compute nothing: they look at memory differently, or call others."""
MOVES = _names(
    "copy _to_copy clone _copy_from cat stack index index_select index_add index_put _index_put_impl index_copy gather "
    "scatter scatter_add scatter_reduce masked_select nonzero nonzero_static take roll flip repeat repeat_interleave "
    "constant_pad_nd select_backward slice_backward sum mean amax amin max min argmax argmin all any prod var var_mean "
    "std norm linalg_vector_norm cumsum diff sort topk unique _unique2 bincount searchsorted bucketize native_dropout "
    "native_dropout_backward bernoulli _fused_dropout normal uniform random tril triu one_hot isfinite isin where "
    "_chunk_cat split_with_sizes_copy _foreach_norm"
)
"""Operators that torch does not call pointwise and that pass over memory as those do: copies, indices, sums."""
COLLECTIVES: tuple[str, ...] = ("c10d::", "_c10d_functional::", "gloo:", "nccl:", "fsdp::", "FSDP::")
COLLECTIVES += ("record_param_comms", "bigtrain::sum_over_ranks")
GRAPH = "## Call CompiledFxGraph"

AROUND = (
    (re.compile(rf"{UPDATE_MARK}|Optimizer\.(step|zero_grad)|torch::autograd::AccumulateGrad"), OPTIMIZER),
    (re.compile(rf"{DATA_MARK}"), DATA),
    (re.compile(rf"{BATCH_MARK}"), COPIES),
    (re.compile("|".join(map(re.escape, COLLECTIVES))), COMMUNICATION),
    (re.compile(r"_InPlace(Backward)?$|.*([Aa]ttention|DotProduct|_varlen_attn|VarlenAttn)"), ATTENTION),
    (re.compile(r"_LinearCrossEntropy|(Log|_log_|_)?[Ss]oftmax|NllLoss|CrossEntropy"), LOSS),
    (re.compile(r"_(RMS|Layer)Norm(Backward)?$|(Native|Fused)?(Layer|Rms|RMS)Norm"), NORMALIZATION),
    (re.compile(r"_Rows(Backward)?$|Embedding"), EMBEDDING),
    (re.compile(re.escape(GRAPH)), FUSED),
)
"""By the beginning of the name of what something ran inside of, the nearest first, the class that it belongs to."""
WHOLE = (OPTIMIZER, ATTENTION, COMMUNICATION)
"""Classes to which all belongs that ran inside of them, matrix products as well."""

OPERATORS = (
    (re.compile(r"attention|attn|flash|fmha"), ATTENTION),
    (re.compile(r"(layer|rms|batch|group|instance)_norm"), NORMALIZATION),
    (re.compile(r"softmax|logsumexp|nll_loss|cross_entropy"), LOSS),
    (re.compile(r"embedding"), EMBEDDING),
    (re.compile(r"_fused_(adam|sgd|adagrad)"), OPTIMIZER),
    (re.compile(r"^_foreach_"), ELEMENTWISE),
)
KERNELS = (
    (re.compile(r"flash|fmha|attention|attn"), ATTENTION),
    (re.compile(r"nccl|rccl|allreduce|all_?gather|reduce_?scatter"), COMMUNICATION),
    (re.compile(r"gemm|gemv|cutlass|cublas|xmma|nvjet|wgmma|splitk|triton_tem|triton_mm|s\d+cudnn|Cijk_"), MATRIX),
    (re.compile(r"^triton_"), FUSED),
    (re.compile(r"layer_?norm|rms_?norm|LayerNorm|GammaBeta"), NORMALIZATION),
    (re.compile(r"softmax|SoftMax|nll_loss|cross_entropy"), LOSS),
    (re.compile(r"embedding"), EMBEDDING),
    (re.compile(r"fused_?adam|FusedAdam|multi_tensor"), OPTIMIZER),
    (re.compile(r"FillFunctor|Memset|memset"), MEMORY),
    (re.compile(r"elementwise|vectorized|reduce|scan|sort|index|scatter|gather|Cat|[Cc]opy|dropout|Memc"), ELEMENTWISE),
)  # fmt: skip
TRANSFERS = re.compile(r"Memcpy (HtoD|DtoH|HtoH)")


def class_of_operator(names: Sequence[str]) -> str:
    """Return the class of the time that an operator takes by itself on a CPU; `names` are its own and those around."""
    return _placed(own_class(names[0]), names)


def class_of_kernel(kernel: str, names: Sequence[str]) -> str:
    """Return the class of a kernel on a GPU; `names` are those of what launched it, and of what that ran inside of."""
    if TRANSFERS.match(kernel):
        return COPIES
    by_name = next((name for pattern, name in KERNELS if pattern.search(kernel)), OTHER)
    if by_name in (COMMUNICATION, FUSED):
        return _placed(by_name, names)
    launching = own_class(names[0]) if names else OTHER
    return _placed(by_name if launching in (CALLS, OTHER, FUSED) else launching, names)


def _placed(own: str, names: Sequence[str]) -> str:
    """Return the class of something that is of a class by its name alone, where it ran."""
    if any(name.startswith(DATA_MARK) for name in names):
        return DATA
    around = next(filter(None, map(_around, names)), None)
    if around is None or (own == CALLS and around != COMMUNICATION):
        return own
    if around in WHOLE or own in (ELEMENTWISE, MEMORY, OTHER):
        return around
    return own


@cache
def _around(name: str) -> str | None:
    return next((found for pattern, found in AROUND if pattern.match(name.rpartition("evaluate_function: ")[2])), None)


@cache
def own_class(name: str) -> str:
    """Return the class of an operator of the host by its name alone; OTHER for one that is not known."""
    if name.startswith(COLLECTIVES):
        return COMMUNICATION
    if name.startswith(GRAPH):
        return FUSED
    if "::" not in name or name in MARKS or name.startswith(("autograd::", "torch::autograd::")):
        return CALLS
    space, _, operator = name.partition("::")
    found = next((found for pattern, found in OPERATORS if pattern.search(operator)), None)
    if found is not None:
        return found
    base = operator.rstrip("_")
    for members, its in ((PRODUCTS, MATRIX), (FILLS, MEMORY), (DISPATCH, CALLS), (MOVES, ELEMENTWISE)):
        if base in members:
            return its
    if space in ("mkldnn", "mkl", "inductor") and re.search(r"linear|mm", operator):
        return MATRIX
    return ELEMENTWISE if _is_pointwise(space, operator) else OTHER


def _is_pointwise(space: str, operator: str) -> bool:
    """Tell whether torch itself says that an operator is pointwise."""
    packet = getattr(getattr(torch.ops, space), operator, None)
    overloads = packet.overloads() if packet is not None else ()
    return any(torch.Tag.pointwise in getattr(packet, name).tags for name in overloads)
