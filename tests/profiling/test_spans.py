"""What a profiler heard, as spans: nested by thread and time, each with what it took by itself."""

from __future__ import annotations

import torch
from torch.profiler import ProfilerActivity, profile, record_function

from bigtrain.profiling.spans import Event, events_of, nested


def test_self_times_sum_to_the_outermost() -> None:
    events = [
        Event("inner", 20, 30), Event("outer", 0, 100), Event("innermost", 20, 25), Event("later", 60, 70),
        Event("elsewhere", 22, 28, thread=1), Event("kernel", 5, 50, on_device=True),
    ]  # fmt: skip
    spans = {span.event.name: span for span in nested(events)}
    assert {name: span.self_ns for name, span in spans.items()} == {
        "outer": 80, "inner": 5, "innermost": 5, "elsewhere": 6, "later": 10,
    }  # fmt: skip
    assert list(spans["innermost"].names()) == ["innermost", "inner", "outer"]
    assert list(spans["elsewhere"].names()) == ["elsewhere"]
    assert list(spans["later"].names()) == ["later", "outer"]


def test_neighbours_that_touch_are_not_inside_of_each_other() -> None:
    spans = nested([Event("all", 0, 30), Event("a", 0, 10), Event("b", 10, 20), Event("nothing", 20, 20)])
    assert [(span.event.name, span.parent and span.parent.event.name) for span in spans] == [
        ("all", None), ("a", "all"), ("b", "all"), ("nothing", "all"),
    ]  # fmt: skip


def test_torch_is_heard() -> None:
    with profile(activities=[ProfilerActivity.CPU]) as profiler, record_function("bigtrain::step"):
        torch.ones(4, 4) @ torch.ones(4, 4)
    spans = {span.event.name: span for span in nested(events_of(profiler))}
    assert list(spans["aten::mm"].names()) == ["aten::mm", "aten::matmul", "bigtrain::step"]
    step = spans["bigtrain::step"].event
    inside = [span for span in spans.values() if "bigtrain::step" in span.names()]
    assert 0 < spans["bigtrain::step"].self_ns < step.end_ns - step.begin_ns
    assert len(inside) >= 3


class Heard:
    """An event as torch's profiler gives it, of a device or of the host."""

    def __init__(self, name: str, *, device: bool = False, linked: int = 0, user: bool = False) -> None:
        self._name, self._device, self._linked, self._user = name, device, linked, user

    def __getattr__(self, name: str) -> object:
        kind = torch.autograd.DeviceType.CUDA if self._device else torch.autograd.DeviceType.CPU
        values = {
            "name": self._name, "device_type": kind, "linked_correlation_id": self._linked, "is_async": False,
            "is_user_annotation": self._user, "correlation_id": 7, "start_ns": 1, "end_ns": 2, "start_thread_id": 1,
        }  # fmt: skip
        return lambda: values[name]


class Results:
    def __init__(self, *events: Heard) -> None:
        self._events, self.profiler, self.kineto_results = events, self, self

    def events(self) -> tuple[Heard, ...]:
        return self._events


def test_of_cuda_kernels_stay_and_neither_annotations_nor_the_runtimes_calls() -> None:
    heard = Results(
        Heard("aten::mm"), Heard("nvjet_hsh", device=True, linked=7), Heard("cudaLaunchKernel", linked=7),
        Heard("bigtrain::step", device=True, linked=7, user=True), Heard("Event Sync", device=True),
        Heard("FSDP::pre_forward", user=True), Heard("FSDP::pre_forward", device=True),
    )  # fmt: skip
    found = events_of(heard)
    assert [(event.name, event.on_device, event.launched_by) for event in found] == [
        ("aten::mm", False, 0), ("nvjet_hsh", True, 7), ("FSDP::pre_forward", False, 0),
    ]  # fmt: skip
    assert found[0].number == 7
