"""The whole examination, on this machine; and what the command prints of it."""

from __future__ import annotations

import json

import pytest
from typer.testing import CliRunner

from bigtrain import cli, doctor
from bigtrain.doctor import examine
from bigtrain.doctor.finding import Finding, fault, note, ok

WHATS = (
    *("Python", "host memory", "cache", "runs", "locked memory", "shared memory", "open files", "torch", "CPU"),
    *("driver", "CUDA", "processes", "NCCL", "matrix products", "speed", "apex", "attention", "flash-attn"),
    *("FlashOptim", "torchao", "datasets", "tokenizers", "transformers", "deepspeed", "ranks", "network"),
)


@pytest.mark.slow
def test_this_machine_passes_and_each_finding_that_is_not_ok_says_what_to_do() -> None:
    found = {finding.what: finding for finding in examine()}
    assert found.keys() >= set(WHATS)
    assert not [finding for finding in found.values() if finding.is_fault]
    assert all(finding.do for finding in found.values() if finding.state != "ok")
    assert "FLOP/s over 2 s" in found["speed"].text


def test_a_torch_that_is_absent_is_not_asked(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(doctor.devices, "version_of", lambda _name: None)
    monkeypatch.setattr(doctor, "ask_torch", lambda _cache: pytest.fail("asked"))
    assert [finding.what for finding in examine() if finding.is_fault] == ["torch"]


@pytest.mark.parametrize(
    ("found", "code"),
    [([ok("torch", "2.13"), note("CUDA", "no device", "buy one")], 0), ([fault("Python", "3.10", "use 3.11")], 1)],
)
def test_the_command_tells_people_and_programs(
    monkeypatch: pytest.MonkeyPatch, found: list[Finding], code: int
) -> None:
    monkeypatch.setattr(doctor, "examine", lambda: found)
    told = CliRunner().invoke(cli.app, ["doctor"])
    assert told.exit_code == code
    assert told.stdout.splitlines()[: len(found)] == doctor.lines(found)
    said = CliRunner().invoke(cli.app, ["doctor", "--json"])
    assert said.exit_code == code
    answer = json.loads(said.stdout)
    assert answer["faults"] == code
    assert answer["findings"][-1] == found[-1]._asdict()
    assert answer["findings"][0].keys() == {"state", "what", "text", "do"}
