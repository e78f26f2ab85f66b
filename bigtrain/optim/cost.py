"""What optimizer states and steps weigh, in bytes, exactly. No torch."""

from __future__ import annotations

import math
from collections.abc import Collection, Iterable, Iterator, Sequence

from bigtrain.errors import InputError

OPTIMIZERS = ("adamw", "lamb", "muon", "adafactor")
STATES = ("fp32", "bf16", "8bit", "4bit")
MASTER_WEIGHTS = ("fp32", "split24", "none")

MOMENTS = {"adamw": 2, "lamb": 2}
"""Tensors of a parameter's size that an optimizer keeps for each parameter."""

BLOCK_ELEMENTS = {"8bit": 256, "4bit": 128}
"""Elements that share an fp32 scale."""

LEAST_QUANTIZED_ELEMENTS = 4096
"""Smaller tensors (biases, normalizations) keep fp32 moments under `8bit` and `4bit`: they weigh nothing and matter."""

PIECE_ELEMENTS = {"cpu": 2**17, "cuda": 2**20}
"""Elements that are worked on at once: on the CPU what its caches hold, on a GPU enough to fill it."""

DITHER_WINDOWS = 4096
"""Steps after which the rounding noise repeats."""

NOISE_ELEMENTS = 4096
"""Elements after which it repeats within a tensor; a multiple of all blocks."""

NORM_CHUNK_ELEMENTS = 2**20
"""Elements of a gradient below fp32 that gradient release converts at a time, for the gradient's norm."""

EXCHANGED_ELEMENTS = 2**18
"""Column sums that Adafactor adds up over ranks at once: a megabyte, so that latency does not count."""

STAGES = 2
"""Pieces of what is on the host that are on the device at a time: one is updated while the next arrives."""

STAGED_MULTIPLE = 512
"""Bytes of which each tensor that visits fills whole ones: there it begins as tensors of their own would."""

Shape = Sequence[int]


def staged_bytes(sizes: Iterable[int]) -> int:
    """Return the memory on the device that one piece takes, of tensors of these sizes, while it visits."""
    return sum(STAGED_MULTIPLE * block_count(size, STAGED_MULTIPLE) for size in sizes)


def releasable(name: str, *, sharded: bool) -> bool:
    """Tell whether an optimizer can update a parameter inside the backward pass, where others have its other rows.

    Those that look at whole parameters would have to wait for other ranks there.
    """
    return name == "adamw" or not sharded


def state_bytes(name: str, parameters: int, tensors: int) -> int:
    """Return the bytes of AdamW's or LAMB's fp32 states for so many parameters in so many tensors."""
    return MOMENTS[name] * 4 * parameters + 4 * tensors


def supported_states(name: str) -> tuple[str, ...]:
    """Return the values of `optimizer.state` that an optimizer can use."""
    return ("fp32",) if name == "adafactor" else STATES


def check(name: str, state: str, master_weights: str) -> None:
    """Raise InputError, with what to write instead, for a combination that no optimizer here has."""
    for key, value, known in (
        ("optimizer.name", name, OPTIMIZERS),
        ("optimizer.state", state, STATES),
        ("amp.master_weights", master_weights, MASTER_WEIGHTS),
    ):
        check_known(key, value, known)
    if state not in supported_states(name):
        raise InputError(f"optimizer.state: {state}: {name} keeps rows and columns only; use fp32")


def check_known(key: str, value: str, known: Sequence[str]) -> None:
    """Raise InputError unless a key's value is one of those that are known."""
    if value not in known:
        raise InputError(f"{key}: {value!r} is none of {', '.join(known)}")


def tensor_state_bytes(name: str, state: str, master_weights: str, shape: Shape, *, matrix: bool = False) -> int:
    """Return the bytes that an optimizer keeps for one parameter, its fp32 step count included.

    `matrix` says that Muon orthogonalises this one. Split24's remainder counts here, the bf16 parameter does not.
    """
    return sum(tensor_state_parts(name, state, master_weights, shape, matrix=matrix))


def tensor_state_parts(
    name: str, state: str, master_weights: str, shape: Shape, *, matrix: bool = False
) -> tuple[int, ...]:
    """Return the bytes of each tensor that an optimizer keeps for one parameter, in the order it makes them."""
    elements = math.prod(shape)
    remainder = (elements,) if master_weights == "split24" else ()
    if name == "adafactor":
        sums = (4 * shape[0], 4 * math.prod(shape[1:])) if len(shape) >= 2 else (4 * elements,)
        return (4, *sums, *remainder)
    moments = 1 if name == "muon" and matrix else 2
    return (4, *moments * _moment_parts(state, elements), *remainder)


def optimizer_state_bytes(
    name: str,
    state: str,
    master_weights: str,
    shapes: Iterable[Shape],
    matrices: Collection[int] | None = None,
) -> int:
    """Return the bytes that an optimizer keeps after its first step, over all its parameters.

    `matrices` are the places in `shapes` that Muon orthogonalises; None means all of two dims,
    as for `build_optimizer`.
    """
    check(name, state, master_weights)
    return sum(
        tensor_state_bytes(name, state, master_weights, shape, matrix=_is_matrix(place, shape, matrices))
        for place, shape in enumerate(shapes)
    )


def moment_bytes(state: str, elements: int) -> int:
    """Return the bytes of one moment of a tensor with so many elements: codes, filled up to blocks, and scales."""
    return sum(_moment_parts(state, elements))


def _moment_parts(state: str, elements: int) -> tuple[int, ...]:
    if state not in BLOCK_ELEMENTS or elements < LEAST_QUANTIZED_ELEMENTS:
        return (elements * (2 if state == "bf16" else 4),)
    block = BLOCK_ELEMENTS[state]
    blocks = block_count(elements, block)
    return (elements if state == "8bit" else blocks * block // 2, 4 * blocks)


def block_count(elements: int, block: int) -> int:
    """Return the blocks that so many elements take."""
    return -(-elements // block)


def buffer_elements(piece_elements: int) -> int:
    """Return the elements of a work buffer: a piece, filled up to whole blocks and rows of noise."""
    return NOISE_ELEMENTS * block_count(piece_elements, NOISE_ELEMENTS)


def piece_elements(device: str, shapes: Iterable[Shape]) -> int:
    """Return the elements of the pieces in which an optimizer of these parameters works; `device` is cpu or cuda."""
    return min(PIECE_ELEMENTS[device], max(map(math.prod, shapes), default=1)) or 1


def step_temporary_bytes(
    name: str,
    state: str,
    master_weights: str,
    shapes: Sequence[Shape],
    matrices: Collection[int] | None = None,
    *,
    device: str = "cpu",
) -> int:
    """Return the most that a step allocates beyond weights, gradients and states, scalars (8 B each) left out.

    Gradients have the dtype of the weights: fp32, or bf16 for split24 and none.
    """
    transient = (
        tensor_temporary_bytes(name, shape, matrix=_is_matrix(place, shape, matrices), device=device)
        for place, shape in enumerate(shapes)
    )
    return buffer_bytes(name, state, master_weights, shapes, matrices, device=device) + max(transient, default=0)


def buffer_bytes(
    name: str,
    state: str,
    master_weights: str,
    shapes: Sequence[Shape],
    matrices: Collection[int] | None = None,
    *,
    accumulated: bool = False,
    narrow: bool = False,
    sharded: bool = False,
    device: str = "cpu",
) -> int:
    """Return the bytes of work buffers and noise tables, which an optimizer makes in its first step and keeps.

    Gradients have the dtype of the weights, or are fp32 where those of several micro-batches are `accumulated`; those
    of weights whose fp32 masters are offloaded are `narrow` else. Where parameters are `sharded`, the shapes are those
    of this rank's rows.
    """
    check(name, state, master_weights)
    used = {
        buffer
        for place, shape in enumerate(shapes)
        for buffer in _work(name, state, master_weights, shape, name == "muon" and _is_matrix(place, shape, matrices))
    }
    if narrow:
        used.add("gradient")
    if accumulated:
        used.discard("gradient")
    elements = adafactor_piece(device, shapes) if name == "adafactor" else piece_elements(device, shapes)
    tables = sum(1 for buffer in used if buffer.startswith("noise"))
    exchanged = exchanged_elements(shapes) if sharded and name == "adafactor" else 0
    work = buffer_elements(elements) * (len(used) - tables) + (NOISE_ELEMENTS + DITHER_WINDOWS) * tables
    return 4 * (work + exchanged)


def exchanged_elements(shapes: Iterable[Shape]) -> int:
    """Return the elements in which Adafactor adds up columns over ranks; each matrix takes one more than it has."""
    largest = max((1 + math.prod(shape[1:]) for shape in shapes if len(shape) >= 2), default=0)
    return max(EXCHANGED_ELEMENTS, largest) if largest else 0


def tensor_temporary_bytes(
    name: str, shape: Shape, *, matrix: bool = False, sharded: bool = False, device: str = "cpu"
) -> int:
    """Return what the update of one tensor holds for a moment: Muon's iteration on a matrix, Adafactor's sums.

    Where parameters are `sharded`, Adafactor has the sums of columns in a buffer, and the shape is that of the rows.
    """
    if name == "adafactor":
        return _adafactor_bytes(shape, sharded)
    return _muon_bytes(shape, device) if name == "muon" and matrix else 0


def _work(name: str, state: str, master_weights: str, shape: Shape, matrix: bool) -> Iterator[str]:
    """Yield the work buffers and noise tables that a step on one parameter uses."""
    if master_weights != "fp32":
        yield from ("gradient", "weight", "noise of weights")
    if master_weights == "split24":
        yield "spare"
    if name == "adafactor":
        yield "update"
        return
    if name == "lamb":
        yield "update"
    if state == "bf16":
        yield from ("first", "noise of first") if matrix else ("first", "noise of first", "second", "noise of second")
    elif state in BLOCK_ELEMENTS and math.prod(shape) >= LEAST_QUANTIZED_ELEMENTS:
        yield from ("first", "noise of first", "spare", "other_spare", "factors")
        if not matrix:
            yield from ("second", "noise of second")


def _muon_bytes(shape: Shape, device: str) -> int:
    """Return the bytes of the iteration on one matrix: two of it and two squares, fp32 on the CPU.

    On a GPU these four are bf16, and the fp32 direction that they start from is still there.
    """
    short, long = sorted(shape)
    iteration = 2 * short * long + 2 * short * short
    return 4 * iteration if device == "cpu" else 2 * iteration + 4 * short * long


def adafactor_piece(device: str, shapes: Iterable[Shape]) -> int:
    """Return the elements of Adafactor's largest piece: whole rows where there are rows."""
    return max((row_piece(device, shape) for shape in shapes), default=0)


def row_piece(device: str, shape: Shape) -> int:
    """Return the elements of a piece of one parameter for Adafactor."""
    elements = math.prod(shape)
    if len(shape) < 2 or not elements:
        return min(PIECE_ELEMENTS[device], elements)
    columns = elements // shape[0]
    return columns * min(shape[0], max(1, PIECE_ELEMENTS[device] // columns))


def _adafactor_bytes(shape: Shape, sharded: bool) -> int:
    """Return the bytes of one tensor's row and column means, and of a piece's own column sums."""
    if len(shape) < 2:
        return 0
    return 4 * (shape[0] + (1 if sharded else 2) * math.prod(shape[1:]))


def _is_matrix(place: int, shape: Shape, matrices: Collection[int] | None) -> bool:
    return len(shape) == 2 and (matrices is None or place in matrices)
