"""Causes and places of measured allocations: from made-up traces, and from real tensors whose purpose is plain."""

from __future__ import annotations

from collections.abc import Callable

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from torch import Tensor, nn

from bigtrain import optim, recompute
from bigtrain.memory.attribute import attribute, causes_at_peak, until_peak
from bigtrain.memory.marks import mark, marked, tensors_kept
from bigtrain.memory.measure import MARK, NODE, Allocation, Operation, Trace
from bigtrain.memory.record import Recording
from bigtrain.memory.report import CAUSES
from bigtrain.models.loss import linear_cross_entropy
from tests.shared.beside_blocks import record_beside_blocks

Spans = list[tuple[str, int, int, int]]


def trace_of(spans: Spans, allocations: list[tuple[int, int, int, int | None]]) -> Trace:
    """Return a trace of spans (name, begin, end, sequence) and allocations (size, address, begin, end), in order."""
    operations: list[Operation] = []
    for name, begin, end, sequence in spans:
        inside = [o for o in operations if o.begin_ns <= begin and end <= o.end_ns]
        backward = name.startswith(NODE) or name.endswith("Backward0")
        operations.append(Operation(name, inside[-1] if inside else None, begin, end, sequence, backward))
    found = []
    for size, address, begin, end in allocations:
        inside = [o for o in operations if o.begin_ns <= begin < o.end_ns]
        found.append(Allocation(size, address, inside[-1] if inside else None, begin, end))
    moments = [(a.begin_ns, 0, i) for i, a in enumerate(found)]
    moments += [(a.end_ns, 1, ~i) for i, a in enumerate(found) if a.end_ns is not None]
    return Trace(found, [event for _, _, event in sorted(moments)], operations)


FORWARD: Spans = [
    (f"{MARK}step 0", 10, 100, -1),
    (f"{MARK}forward", 10, 40, -1),
    (f"{MARK}block blocks.0", 20, 30, -1),
    ("aten::linear", 21, 25, 7),
    (f"{MARK}backward", 40, 70, -1),
    (f"{NODE}: AddmmBackward0", 50, 60, 7),
    ("aten::gelu", 51, 55, 9),
    (f"{MARK}update", 70, 100, -1),
]


@pytest.mark.parametrize(
    ("begin", "end", "cause", "place", "phase"),
    [
        (5, 6, "temporaries", "", ""),
        (11, 45, "activations", "", "forward"),
        (22, 45, "activations", "blocks.0", "forward"),
        (22, 24, "temporaries", "blocks.0", "forward"),
        (26, 28, "activations", "blocks.0", "forward"),
        (52, 58, "activations", "blocks.0", "backward"),
        (52, 54, "temporaries", "blocks.0", "backward"),
        (57, 69, "temporaries", "blocks.0", "backward"),
        (65, 69, "temporaries", "", "backward"),
        (75, 80, "temporaries", "", "update"),
        (22, None, "temporaries", "blocks.0", "forward"),
    ],
)
def test_when_and_where_tells_the_cause(begin: int, end: int | None, cause: str, place: str, phase: str) -> None:
    recording = attribute(trace_of(FORWARD, [(100, 1, begin, end)]), {})
    assert (recording.causes, recording.places, recording.phases) == ([cause], [place], [phase])


SHARDED: Spans = [
    (f"{MARK}step 0", 0, 100, -1),
    (f"{MARK}forward", 0, 40, -1),
    ("FSDP::pre_forward (blocks.0)", 5, 19, -1),
    ("FSDP::forward_prefetch for blocks.1", 6, 12, -1),
    ("FSDP::all_gather (blocks.1)", 7, 11, -1),
    (f"{MARK}block blocks.0", 20, 30, -1),
    ("aten::native_layer_norm", 21, 25, 7),
    (f"{MARK}backward", 40, 80, -1),
    (f"{NODE}: NativeLayerNormBackward0", 41, 50, -1),
    ("NativeLayerNormBackward0", 42, 50, 7),
    ("aten::empty", 43, 44, -1),
    ("FSDP::post_backward_reshard (blocks.0)", 52, 56, -1),
    ("FSDP::post_backward_reduce (blocks.0)", 60, 70, -1),
    ("FSDP::post_backward_reduce", 72, 78, -1),
]


@pytest.mark.parametrize(
    ("begin", "end", "cause", "place", "phase"),
    [
        (5, 95, "communication", "blocks.0", "forward"),
        (8, 95, "communication", "blocks.1", "forward"),
        (43, 48, "temporaries", "blocks.0", "backward"),
        (53, 90, "gradients", "blocks.0", "backward"),
        (62, 75, "communication", "blocks.0", "backward"),
        (62, 90, "gradients", "blocks.0", "backward"),
        (73, 77, "communication", "", "backward"),
    ],
)
def test_what_sharding_holds_is_sent_or_waits(begin: int, end: int, cause: str, place: str, phase: str) -> None:
    """Sums that wait for other micro-batches are gradients; a node with hooks has its number on an inner operation."""
    recording = attribute(trace_of(SHARDED, [(100, 1, begin, end)]), {})
    assert (recording.causes, recording.places, recording.phases) == ([cause], [place], [phase])


def test_addresses_tell_what_is_kept_and_what_is_a_gradient() -> None:
    spans = [*FORWARD, (f"{MARK}gradient 9 blocks.0", 58, 59, -1)]
    trace = trace_of(spans, [(5, 8, 2, None), (100, 9, 12, 15), (10, 9, 52, 90), (1, 9, 95, None)])
    kept = {9: ("optimizer_state", ""), 8: ("weights", "blocks.0")}
    recording = attribute(trace, kept)
    assert recording.causes == ["weights", "activations", "gradients", "optimizer_state"]
    assert recording.places == ["blocks.0", "", "blocks.0", ""]


def test_steps_are_marked_before_their_first_event() -> None:
    spans: Spans = [(f"{MARK}step 0", 10, 20, -1), (f"{MARK}step 1", 20, 30, -1)]
    recording = attribute(trace_of(spans, [(1, 1, 5, 11), (2, 2, 12, 22), (3, 3, 25, 28)]), {})
    assert recording.marks == {"step 0": 1, "step 1": 3}


def test_a_number_seen_twice_belongs_to_the_block_that_used_it() -> None:
    spans: Spans = [
        (f"{MARK}forward", 0, 10, -1),
        (f"{MARK}block blocks.0", 1, 4, -1),
        ("aten::detach", 2, 3, 5),
        (f"{MARK}block blocks.1", 5, 9, -1),
        ("aten::mm", 6, 8, 5),
        (f"{MARK}backward", 10, 20, -1),
        (f"{NODE}: MmBackward0", 11, 15, 5),
    ]
    assert attribute(trace_of(spans, [(1, 1, 12, 18)]), {}).places == ["blocks.1"]


events = st.lists(st.tuples(st.integers(0, 40), st.integers(1, 40), st.integers(0, 1000)), max_size=12)


@given(events)
def test_the_causes_sum_to_the_peak(drawn: list[tuple[int, int, int]]) -> None:
    allocations = [
        (size, place, 3 * begin, 3 * (begin + length) + 1) for place, (begin, length, size) in enumerate(drawn)
    ]
    trace = trace_of(FORWARD, sorted(allocations, key=lambda a: a[2]))
    held = causes_at_peak(attribute(trace, {}))
    assert sum(held.values()) == trace.timeline.peak_bytes
    assert tuple(held) == CAUSES


def test_causes_since_a_mark_are_of_the_peak_after_it() -> None:
    recording = Recording()
    kept = recording.allocate(10, "weights", "")
    recording.release(recording.allocate(50, "temporaries", ""))
    recording.mark("second")
    recording.release(recording.allocate(20, "activations", ""))
    recording.release(kept)
    whole, later = causes_at_peak(recording), causes_at_peak(recording, "second")
    assert (whole["temporaries"], whole["activations"]) == (50, 0)
    assert (later["weights"], later["activations"], later["temporaries"]) == (10, 20, 0)


def test_a_recording_is_cut_after_the_step_with_the_peak() -> None:
    recording = Recording()
    for step, size in enumerate((10, 30, 20)):
        recording.mark(f"step {step}")
        recording.release(recording.allocate(size, "activations", "blocks.0"))
    cut, step = until_peak(recording)
    assert step == "step 1"
    assert cut.events == recording.events[:4]
    assert cut.places_at_peak(step) == {"blocks.0": 30}


def test_a_peak_before_the_first_step_shows_the_first() -> None:
    recording = Recording()
    recording.release(recording.allocate(99, "temporaries", ""))
    recording.mark("step 0")
    recording.allocate(1, "weights", "")
    assert until_peak(recording)[1] == "step 0"


def stepped(model: nn.Module, forward: Callable[[], Tensor], blocks: list[str]) -> Recording:
    """Return a recording of two real AdamW steps."""
    optimizer = optim.AdamW(model.parameters())

    def run() -> None:
        with marked(model, blocks):
            for number in range(2):
                with mark(f"step {number}"):
                    with mark("forward"):
                        loss = forward()
                    with mark("backward"):
                        loss.backward()
                    with mark("update"):
                        optimizer.step()
                        optimizer.zero_grad()

    trace = record_beside_blocks(run)
    return attribute(trace, tensors_kept(model, optimizer, blocks), head=(512, 16))


def sizes(recording: Recording, cause: str, since: str = "step 1") -> list[int]:
    """Return the sizes of a cause's allocations since a mark."""
    first = sum(event >= 0 for event in recording.events[: recording.marks[since]])
    found = zip(recording.sizes, recording.causes, strict=True)
    return [size for size, its_cause in list(found)[first:] if its_cause == cause]


def test_real_gradients_and_states(torch_seed: int) -> None:
    model = nn.Sequential(nn.Linear(16, 32), nn.GELU(), nn.Linear(32, 16, bias=False))
    x = torch.randn(64, 16)
    recording = stepped(model, lambda: model(x).square().sum(), ["0", "2"])
    weights = [p.numel() * 4 for p in model.parameters()]
    assert sorted(sizes(recording, "gradients")) == sorted(weights)
    states = [size for size, cause in zip(recording.sizes, recording.causes, strict=True) if cause == "optimizer_state"]
    assert sum(states) == sum(2 * size + 4 for size in weights)
    assert {place for place, cause in zip(recording.places, recording.causes, strict=True) if cause == "gradients"} == {
        "0",
        "2",
    }


def test_real_recomputation(torch_seed: int) -> None:
    model = nn.ModuleList([nn.Sequential(nn.Linear(16, 32), nn.GELU(), nn.Linear(32, 16)) for _ in range(2)])
    recompute.apply(model, "full")
    x = torch.randn(64, 16, requires_grad=True)
    recording = stepped(model, lambda: model[1](model[0](x)).square().sum(), ["0", "1"])
    rows = zip(recording.causes, recording.phases, recording.places, recording.sizes, strict=True)
    again = [(place, size) for cause, phase, place, size in rows if cause == "activations" and phase == "backward"]
    inner = 64 * 32 * 4
    assert again.count(("1", inner)) == again.count(("0", inner)) == 4  # product and GELU, in each of two steps


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
def test_real_logits(torch_seed: int, dtype: torch.dtype) -> None:
    head = nn.Linear(16, 512)
    hidden = torch.randn(40, 16, dtype=dtype, requires_grad=True)
    labels = torch.randint(0, 500, (40,))

    def forward() -> Tensor:
        return linear_cross_entropy(hidden, head.weight, head.bias, labels, vocab_size=500, chunk_tokens=20)

    recording = stepped(head, forward, [])
    room, weight = 20 * 512 * 4, 512 * 16 * 4
    logits = sizes(recording, "logits")
    assert logits[0] == room
    # In low precision where products are widened there is one more copy, the slopes, in each of two chunks.
    assert set(logits[1:]) <= {room // 2, room}
    assert sizes(recording, "gradients")[:2] == [weight, 512 * 4]
