"""Every measurement that was ever made on a device holds today's predictions, without that device.

The files are written by scripts/measure_device.py. Where there is none for a kind of device yet, the comparer is still
held: a synthetic record beside its own prediction passes, and each number that is off is named.
"""

from __future__ import annotations

import copy
import importlib.util
import json
import sys
import time
from pathlib import Path
from types import ModuleType
from typing import Any

import pytest

REPOSITORY = Path(__file__).parents[1]
FILES = sorted((REPOSITORY / "benchmarks" / "measured").glob("*/*.json"))


@pytest.fixture(scope="module")
def script() -> Any:
    return loaded("measure_device")


@pytest.fixture
def memory_script(monkeypatch: pytest.MonkeyPatch) -> Any:
    monkeypatch.syspath_prepend(str(REPOSITORY / "scripts"))
    return loaded("bench_memory")


def loaded(name: str) -> Any:
    """Return a script as a module, which finds its neighbours as when it runs."""
    folder = REPOSITORY / "scripts"
    sys.path.insert(0, str(folder))
    try:
        spec = importlib.util.spec_from_file_location(name, folder / f"{name}.py")
        assert spec is not None and spec.loader is not None
        module: ModuleType = importlib.util.module_from_spec(spec)
        spec.loader.exec_module(module)
    finally:
        sys.path.remove(str(folder))
    return module


@pytest.fixture(scope="module")
def synthetic(script: Any) -> dict[str, Any]:
    """Return a record of a device of the table that measured exactly what is predicted."""
    name, keys = next(case for case in script.cases() if case[0].startswith("gpt-124m-1x1x1024"))
    device = {"kind": "cuda", "name": "NVIDIA H200", "memory_bytes": 150110011392, "capability": [9, 0]}
    record = {"name": name, "overrides": keys, "device": device}
    return {**record, "measured": script.predicted_again(record)}


@pytest.mark.parametrize("path", FILES, ids=[f"{path.parent.name}/{path.stem}" for path in FILES])
def test_predictions_hold_against_what_was_measured(script: Any, path: Path) -> None:
    record = json.loads(path.read_text(encoding="utf-8"))
    if "measured" not in record:
        pytest.skip(f"{path.stem} failed when it was to be measured: {record['error'].splitlines()[-1:]}")
    assert script.faults(record, script.predicted_again(record)) == []


def test_a_record_equal_to_its_prediction_passes(script: Any, synthetic: dict[str, Any]) -> None:
    assert synthetic["measured"]["allocated_bytes_peak"] > 2**30
    assert synthetic["measured"]["seconds_per_step"] > 0
    assert script.faults(synthetic, script.predicted_again(synthetic)) == []


@pytest.mark.parametrize("factor", [0.9, 1.1])
@pytest.mark.parametrize("name", ["allocated_bytes_peak", "reserved_bytes_peak", "seconds_per_step"])
def test_a_number_that_is_off_is_named(script: Any, synthetic: dict[str, Any], name: str, factor: float) -> None:
    """Bytes 10% off fail; seconds may be 15% off and fail at twice that."""
    record = copy.deepcopy(synthetic)
    if name == "seconds_per_step":
        factor = 1 + 2 * (factor - 1)
    record["measured"][name] *= factor
    (text,) = script.faults(record, synthetic["measured"])
    assert name in text
    assert record["name"] in text


def test_what_was_not_measured_or_not_predicted_is_left_out(script: Any, synthetic: dict[str, Any]) -> None:
    record = copy.deepcopy(synthetic)
    record["measured"]["reserved_bytes_peak"] = None
    found = {**synthetic["measured"], "allocated_bytes_peak": None}
    assert script.faults(record, found) == []


def test_the_bounds_are_the_promised_ones(script: Any) -> None:
    assert script.TOLERANCES == {
        "allocated_bytes_peak": 0.02,
        "reserved_bytes_peak": 0.05,
        "seconds_per_step": 0.15,
    }


def test_enough_configurations_each_once_and_all_that_matters_varied(script: Any) -> None:
    found = dict(script.cases())
    assert len(found) >= 40
    assert len(found) == len(list(script.cases()))
    written = {key for keys in found.values() for key in keys}
    for key in (
        *(f"recompute.policy={policy}" for policy in ("none", "selective", "full", "offload")),
        *(f"amp.precision={precision}" for precision in ("fp32", "bf16", "fp16", "fp8")),
        *(f"optimizer.state={state}" for state in ("8bit", "4bit")),
        *(f"model.family={family}" for family in ("bert", "gpt", "llama")),
        "amp.master_weights=split24",
        "optimizer.gradient_release=true",
        "train.compile=true",
    ):
        assert key in written, key


def test_most_fit_the_largest_device_and_fewer_a_small_one(script: Any) -> None:
    from bigtrain.planner.hardware import of_name

    some = [case for case in script.cases() if case[0] in ("gpt-124m-1x1x1024", "gpt-124m-128x1x1024")]
    fitting = {device: [script._fits(case, of_name(device)) for case in some] for device in ("h200", "rtx3060", "t4")}
    assert fitting == {"h200": [True, True], "rtx3060": [True, False], "t4": [False, False]}


def test_every_configuration_is_a_recipe(script: Any) -> None:
    from bigtrain.planner.hardware import of_name

    for _, keys in script.cases():
        script._recipe(keys, of_name("h200"))


def test_exit_codes_say_whether_something_is_left(script: Any, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """75 while time is short, 1 where a configuration failed, which is measured again, 0 when all are measured."""
    from bigtrain.planner.hardware import cpu

    predicted = {"allocated_bytes_peak": 1, "reserved_bytes_peak": None, "seconds_per_step": 1.0}
    ends = [{"error": "out of memory"}, {"predicted": predicted, "measured": predicted}]
    asked: list[str] = []

    def measured(keys: list[str], device: str, seconds: float) -> dict[str, Any]:
        asked.extend(keys)
        return ends.pop(0) if keys == ["a"] else {"predicted": predicted, "measured": predicted}

    monkeypatch.setattr(script, "in_process", measured)
    chosen, late, early = [("a", ["a"]), ("b", ["b"])], time.monotonic() + 1000, time.monotonic()
    assert script._measure_all(chosen, tmp_path, cpu(), early) == script.UNFINISHED
    assert [script._measure_all(chosen, tmp_path, cpu(), late) for _ in range(3)] == [1, 0, 0]
    assert asked == ["a", "b", "a"]


def test_a_recipe_may_stand_before_the_keys(script: Any) -> None:
    from bigtrain.planner.hardware import of_name

    recipe = script._recipe(["recipes/bert_large.yaml", "train.steps=3"], of_name("h200"))
    assert (recipe.model.preset, recipe.train.steps, recipe.train.device) == ("bert-large", 3, "cuda")


def test_the_folder_is_that_of_the_device(script: Any) -> None:
    from bigtrain.planner.hardware import Hardware, of_name

    assert script.folder_of(of_name("h200")) == "h200"
    assert script.folder_of(Hardware("cuda", "NVIDIA Next (80 GB)", 1, 2**36)) == "nvidia-next-80-gb"


@pytest.mark.parametrize(("gib", "fault"), [(1.9, False), (2.1, True), (None, True)])
def test_rows_on_cuda_are_held_against_what_is_wanted(
    memory_script: Any, gib: float | None, fault: bool, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """A row that failed, or that holds more, is a fault; both are kept beside what was predicted."""
    name, output = "AdamW quality, 4 x 512", tmp_path / "rows.json"
    found = {"error": "no"} if gib is None else {"measured": {"allocated_bytes_peak": int(gib * 2**30)}}
    monkeypatch.setattr("measure_device.in_process", lambda keys, device, seconds: found)
    assert memory_script._measure_on_cuda(name, [], output) is fault
    assert json.loads(output.read_text())["cuda_measured"][name].get("at_most_gib") == (None if gib is None else 2.0)


@pytest.mark.parametrize(("gib", "code"), [(1.9, 0), (2.1, 1)])
def test_a_row_on_cuda_that_holds_too_much_fails_each_time(
    memory_script: Any, gib: float, code: int, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    from bigtrain.planner.hardware import of_name

    name, output, asked = "AdamW quality, 4 x 512", tmp_path / "rows.json", []

    def measured(keys: list[str], *_: Any) -> dict[str, Any]:
        asked.append(keys)
        return {"measured": {"allocated_bytes_peak": int(gib * 2**30)}}

    monkeypatch.setattr("measure_device.in_process", measured)
    monkeypatch.setattr("torch.cuda.is_available", lambda: True)
    monkeypatch.setattr("bigtrain.planner.hardware.cuda_devices", lambda: of_name("h200"))
    monkeypatch.setattr(memory_script, "CUDA", {name: memory_script.CUDA[name]})
    monkeypatch.setattr(memory_script, "_predicted_on_cuda", lambda *_: {})
    assert [memory_script.rows_on_cuda(output) for _ in range(2)] == [code, code]
    assert len(asked) == 1


def test_what_failed_waits_for_what_was_never_tried(
    script: Any, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    from bigtrain.planner.hardware import cpu

    asked: list[str] = []
    monkeypatch.setattr(script, "in_process", lambda keys, *_: asked.extend(keys) or {"error": "out of memory"})
    script._write(tmp_path / "a.json", {"name": "a", "error": "out of memory"})
    script._write(tmp_path / "b.json", {"name": "b", "measured": {}})
    script._measure_all([(name, [name]) for name in "abcd"], tmp_path, cpu(), time.monotonic() + 1000)
    assert asked == ["c", "d", "a"]


def test_it_goes_on_where_it_stopped(script: Any, tmp_path: Path) -> None:
    path = tmp_path / "a.json"
    assert not script._is_measured(path)
    script._write(path, {"name": "a", "error": "out of memory"})
    assert not script._is_measured(path)
    script._write(path, {"name": "a", "measured": {}})
    assert script._is_measured(path)
    assert [each.name for each in tmp_path.iterdir()] == ["a.json"]
