"""Each example runs as it stands, and prints what its first lines promise."""

from __future__ import annotations

import re
import runpy
import sys
from pathlib import Path

import pytest
from group import run_group

EXAMPLES = Path(__file__).parents[1] / "examples"
LONGEST = 90


def printed(name: str, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch, *words: str) -> str:
    """Run an example in this process and return what it prints."""
    monkeypatch.setattr(sys, "argv", [name, *words])
    runpy.run_path(str(EXAMPLES / f"{name}.py"), run_name="__main__")
    return capsys.readouterr().out


def losses(text: str) -> list[float]:
    return [float(number) for number in re.findall(r"step \d+: loss ([\d.]+)", text)]


def test_examples_are_listed_and_short() -> None:
    table = (EXAMPLES / "README.md").read_text(encoding="utf-8")
    files = sorted(EXAMPLES.glob("*.py"))
    assert files
    assert sorted(re.findall(r"\]\((\w+\.py)\)", table)) == [file.name for file in files]
    for file in files:
        text = file.read_text(encoding="utf-8")
        assert f"python examples/{file.name}" in text.partition('"""\n\n')[0]
        assert len(text.splitlines()) <= LONGEST


@pytest.mark.slow
def test_a_model_of_transformers_takes_less_memory_and_has_the_same_losses(
    capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    words = ("--layers", "2", "--width", "32", "--steps", "2", "--micro", "2")
    text = printed("transformers_loop", capsys, monkeypatch, *words)
    rows = re.findall(r"^(before|after) +([\d.]+) MiB at the peak  losses (.*)$", text, re.MULTILINE)
    assert [name for name, _, _ in rows] == ["before", "after"]
    plain, planned = ([float(number) for number in row[2].split()] for row in rows)
    assert planned == pytest.approx(plain, abs=2e-5)
    assert float(rows[1][1]) < 0.6 * float(rows[0][1])


def test_recomputation_alone(capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch) -> None:
    text = printed("recompute_alone", capsys, monkeypatch, "--layers", "3", "--rows", "4")
    peaks = dict(re.findall(r"^(\w+) +([\d.]+) MiB at the peak, the same losses", text, re.MULTILINE))
    assert float(peaks["full"]) < float(peaks["selective"]) < float(peaks["none"])


@pytest.mark.slow
def test_the_planner_alone(capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch) -> None:
    text = printed("planner_alone", capsys, monkeypatch, "--devices", "h100", "--budgets", "8GiB,1MiB")
    assert re.search(r"h100 +[\d.]+ GiB +[\d,]+ tokens/s  micro-batch \d+, recompute", text)
    assert re.search(r"8GiB: micro-batch \d+, recompute none, none, none, none: [\d.]+ s a step", text)
    assert re.search(r"1MiB: .*a memory budget of 1.00 MiB is", text)


@pytest.mark.slow
def test_a_vision_transformer(capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch) -> None:
    text = printed("vision_transformer", capsys, monkeypatch, "--layers", "2", "--rows", "8", "--steps", "6")
    found = losses(text)
    assert len(found) == 6 and found[-1] < 0.9 * found[0]


@pytest.mark.slow
def test_a_decoder_in_torchtitans_manner_on_one_rank_and_sharded_on_two(
    capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    alone = losses(printed("torchtitan_like", capsys, monkeypatch, "2", "3"))
    first, second = run_group([EXAMPLES / "torchtitan_like.py", 2, 3], 2)
    assert (first.code, second.code) == (0, 0), first.errors[-2000:] + second.errors[-2000:]
    assert losses(first.out) == pytest.approx(alone, abs=2e-5) and not losses(second.out)
    assert alone[-1] < alone[0]
