"""Which kernel attends to documents of any lengths: those that are here, each checked and timed, the fastest taken.

FlashAttention 2 is part of torch. Other kernels come from packages of their own, some of which torch puts in the place
of its own when told to; which is fastest depends on the GPU, the heads and the length of rows.
"""

from __future__ import annotations

import importlib
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass
from itertools import accumulate
from statistics import median
from typing import Any, NamedTuple

import torch
from torch import Tensor

from bigtrain.models.attention import Call, Documents, attend_per_document, attend_varlen, in_use

TOLERANCE = {torch.bfloat16: 2e-2, torch.float16: 4e-3, torch.float32: 1e-5}
"""Of the largest number: how far the output and the gradients may be from what fp32 gives."""

CHECKED_TOKENS = 4096
"""At most so many tokens are compared with fp32, which needs room and time."""

REPEATS = 5


@dataclass(frozen=True)
class Kernel:
    """A kernel by its name. `begin` makes it ready and returns its call, or raises what says that it is not here.

    `compiles` says that compiled blocks may call it without leaving their graph.
    """

    name: str
    begin: Callable[[], Call]
    compiles: bool = True


class Case(NamedTuple):
    """What attention of a run is like: the lengths of a micro-batch's documents, (H, K) heads of D numbers."""

    lengths: Sequence[int]
    heads: tuple[int, int]
    head_dim: int
    causal: bool
    dtype: torch.dtype
    device: torch.device


class Found(NamedTuple):
    """What a kernel's trial gave: seconds of a forward and a backward pass, or why it is left out."""

    name: str
    seconds: float | None
    fault: str = ""

    def __str__(self) -> str:
        return f"{self.name} {self.fault}" if self.seconds is None else f"{self.name} {1e3 * self.seconds:.2f} ms"


Clock = Callable[[Callable[[], object]], float]
"""Takes what is to be timed, and returns the seconds that one call takes."""


def kernels() -> list[Kernel]:
    """Return all that may be here, torch's own first."""
    return [
        Kernel(OWN, _torchs(None)),
        Kernel("FlashAttention 3 in torch", _torchs("FA3")),
        Kernel("FlashAttention 4 in torch", _torchs("FA4")),
        Kernel("flash_attn_interface", _packages("flash_attn_interface"), compiles=False),
        Kernel("flash_attn", _packages("flash_attn"), compiles=False),
    ]


OWN = "FlashAttention 2 in torch"


GONE = "gone"
"""Why a kernel is left out that is not here."""


def use(name: str, among: Iterable[Kernel] | None = None, case: Case | None = None) -> str:
    """Attend with a kernel from now on, if it is here and right in a `case`; return what is wrong with it, or nothing.

    If something is, torch is left with its own kernel, and the call in use stays.
    """
    for kernel in kernels() if among is None else among:
        if kernel.name == name:
            call, fault = _begun(kernel)
            if call is not None and case is not None:
                fault = _fault(call, case, repeats_needed=False)
            if call is None or fault:
                _restore_torchs_own()
                return fault or GONE
            in_use.call = call
            return ""
    return GONE


def try_all(
    case: Case, clock: Clock, among: Sequence[Kernel], after_each: Callable[[], object] = lambda: None
) -> list[Found]:
    """Check and time each kernel that is here; one that is wrong, or fails, is among them with the reason.

    A kernel whose gradients differ from call to call is left out where the first one's do not: a run that was killed
    would not go on as it would have. In the end torch has its own kernel. `after_each` is called after each of `among`.
    """
    found: list[Found] = []
    repeats_needed = False
    for kernel in among:
        call, fault = _begun(kernel)
        seconds = None
        if call is not None:
            seconds, fault = _timed(call, case, clock, repeats_needed)
            if not found and not fault:
                repeats_needed = _repeats(call, case)
        if call is not None or fault:
            found.append(Found(kernel.name, seconds, fault))
        after_each()
    _restore_torchs_own()
    return found


def _timed(call: Call, case: Case, clock: Clock, repeats_needed: bool) -> tuple[float | None, str]:
    """Return the seconds that a kernel takes, or None and what is wrong with it."""
    fault = _fault(call, case, repeats_needed)
    if fault:
        return None, fault
    boundaries, inputs = _boundaries(case), _inputs(case)
    try:
        return clock(lambda: _passes(call, case, boundaries, *inputs)), ""
    except Exception as error:
        return None, _left_out(error)


def _begun(kernel: Kernel) -> tuple[Call | None, str]:
    """Return a kernel's call, or None and what is wrong with it; torch has its own kernel until then."""
    _restore_torchs_own()
    try:
        return kernel.begin(), ""
    except MISSING:
        return None, ""
    except Exception as error:  # a package of another version than this torch or this GPU needs may raise anything
        return None, _left_out(error)


def _left_out(error: Exception) -> str:
    lines = str(error).splitlines()
    return f"left out: {type(error).__name__}: {lines[0] if lines else ''}".rstrip(": ")


def fastest(found: Iterable[Found]) -> Found | None:
    """Return the fastest of those that are right."""
    right = [one for one in found if one.seconds is not None]
    return min(right, key=lambda one: one.seconds or 0.0, default=None)


def cuda_clock(run: Callable[[], object]) -> float:
    """Return the median seconds of a call on the current GPU, after two that nobody counts."""
    marks = []
    for _ in range(2 + REPEATS):
        begin, end = (torch.cuda.Event(enable_timing=True) for _ in range(2))  # type: ignore[no-untyped-call]
        begin.record()
        run()
        end.record()
        marks.append((begin, end))
    torch.cuda.synchronize()
    return float(median(begin.elapsed_time(end) for begin, end in marks[2:])) / 1e3


MISSING = (ImportError, AttributeError, RuntimeError, ValueError, OSError)
"""What making a kernel ready raises where it is not here, or does not suit this GPU or this torch."""


def _fault(call: Call, case: Case, repeats_needed: bool) -> str:
    """Return what is wrong with a kernel, or nothing."""
    small = _part(case)
    boundaries, inputs = _boundaries(small), _inputs(small)
    try:
        mine = _passes(call, small, boundaries, *inputs)
        if repeats_needed and not _repeats(call, small):
            return "left out: its gradients differ from call to call"
    except Exception as error:
        return _left_out(error)
    wanted = _passes(_reference, small, boundaries, *(tensor.float() for tensor in inputs))
    for one, other in zip(mine, wanted, strict=True):
        error_share = float((one.float() - other).abs().max() / other.abs().max())
        if not error_share <= TOLERANCE[case.dtype]:
            return f"left out: off by {error_share:.1e} of the largest number"
    return ""


def _repeats(call: Call, case: Case) -> bool:
    """Tell whether the same call gives the same bits again."""
    small = _part(case)
    boundaries, inputs = _boundaries(small), _inputs(small)
    once, again = (_passes(call, small, boundaries, *inputs) for _ in range(2))
    return all(torch.equal(one, other) for one, other in zip(once, again, strict=True))


def _part(case: Case) -> Case:
    """Return the first documents of a case, the first one at least, and all that are empty."""
    ends = accumulate(case.lengths)
    kept = [length for length, end in zip(case.lengths, ends, strict=True) if not length or end <= CHECKED_TOKENS]
    return case._replace(lengths=kept if any(kept) else [*case.lengths[:1], *kept])


def _boundaries(case: Case) -> Tensor:
    """Return where documents begin and end; it waits for the device, and so is made before anything is timed."""
    return Documents.of_lengths(case.lengths, case.device).cu_seqlens


def _inputs(case: Case) -> tuple[Tensor, Tensor, Tensor]:
    """Return queries, keys and values, the same at each call."""
    (H, K), D, N = case.heads, case.head_dim, sum(case.lengths)
    generator = torch.Generator().manual_seed(0)
    made = torch.randn(N, H + 2 * K, D, generator=generator).to(case.device, case.dtype)
    q_NHD, k_NKD, v_NKD = made.split_with_sizes([H, K, K], dim=1)
    return q_NHD, k_NKD, v_NKD


def _passes(call: Call, case: Case, boundaries: Tensor, *inputs: Tensor) -> list[Tensor]:
    """Run forward and backward; returns the output and the gradients of queries, keys and values."""
    given = [tensor.detach().requires_grad_() for tensor in inputs]
    with torch.enable_grad():
        out_NHD = call(given[0], given[1], given[2], boundaries, max(case.lengths), case.causal)
    return [out_NHD.detach(), *torch.autograd.grad(out_NHD, given, out_NHD.detach())]


def _reference(q_NHD: Tensor, k_NKD: Tensor, v_NKD: Tensor, cu_seqlens: Tensor, longest: int, causal: bool) -> Tensor:
    documents = Documents(cu_seqlens, longest)
    out_NHD: Tensor = attend_per_document(q_NHD, k_NKD, v_NKD, documents, causal=causal, dropout=0.0)
    return out_NHD


def _torchs(implementation: str | None) -> Callable[[], Call]:
    """Return what makes torch take one of its implementations, None its own: that holds for the whole process.

    Of a torch that cannot go back to its own none is taken.
    """

    def begin() -> Call:
        if implementation is None:
            _restore_torchs_own()
            return attend_varlen
        attention: Any = importlib.import_module("torch.nn.attention")
        if not hasattr(attention, "restore_flash_attention_impl"):
            raise AttributeError("restore_flash_attention_impl")
        attention.activate_flash_attention_impl(implementation)
        return attend_varlen

    return begin


def _restore_torchs_own() -> None:
    """Have torch take its own implementation, as it does before it is told to take another."""
    attention: Any = importlib.import_module("torch.nn.attention")
    if hasattr(attention, "restore_flash_attention_impl") and attention.current_flash_attention_impl():
        attention.restore_flash_attention_impl()


def _packages(module: str) -> Callable[[], Call]:
    """Return what makes a package's own function ready."""

    def begin() -> Call:
        function: Any = importlib.import_module(module).flash_attn_varlen_func

        def call(q: Tensor, k: Tensor, v: Tensor, cu_seqlens: Tensor, longest: int, causal: bool) -> Tensor:
            out: Any = function(q, k, v, cu_seqlens, cu_seqlens, longest, longest, causal=causal)
            attended: Tensor = out[0] if isinstance(out, tuple) else out
            return attended

        return call

    return begin
