"""`bigtrain profile` on two ranks, from one end to the other: one process each, the first one shows what it held."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest

from bigtrain.memory.report import CAUSES

OVERRIDES = (
    "model.hidden_size=64",
    "model.num_attention_heads=2",
    "data.vocab_size=300",
    "data.sequence_length=32",
    "train.device=cpu",
    "train.compile=false",
    "train.global_batch_size=8",
    "train.micro_batch_size=2",
    "sharding.zero_stage=3",
    "cluster.devices_per_node=2",
    "recompute.policy=none",
)
Ran = subprocess.CompletedProcess[str]


def bigtrain(folder: Path, *arguments: str) -> Ran:
    return subprocess.run(
        [sys.executable, "-m", "bigtrain", *arguments],
        cwd=folder,
        capture_output=True,
        text=True,
        timeout=580,
        env={**os.environ, "OMP_NUM_THREADS": "1"},
        check=False,
    )


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return tmp_path_factory.mktemp("profile")


@pytest.fixture(scope="module")
def ran(folder: Path, corpus_file: Path) -> Ran:
    """Return a profile with everything that it can be asked for."""
    shown = ("--json", "--html", "found.html", "--png", "found.png")
    return bigtrain(folder, "profile", "quickstart_gpt", *OVERRIDES, f"data.source={corpus_file}", *shown)


@pytest.mark.slow
def test_standard_output_is_one_object(ran: Ran) -> None:
    assert ran.returncode == 0, ran.stderr
    found = json.loads(ran.stdout)
    predicted, measured = found["predicted"], found["measured"]
    assert set(predicted["by_cause"]) == set(measured["by_cause"]) == set(CAUSES)
    for cause in ("weights", "optimizer_state"):
        assert measured["by_cause"][cause] == predicted["by_cause"][cause] > 0
    assert -0.001 < found["relative_error"] < 0.06  # rows count as full, and these documents leave some of them empty
    assert [block["name"] for block in found["blocks"]] == ["blocks.0", "blocks.1", "outside of the blocks"]
    assert sum(block["measured_bytes"] for block in found["blocks"]) == measured["allocated_bytes_peak"]


@pytest.mark.slow
def test_the_page_and_the_picture_are_written_once(ran: Ran, folder: Path) -> None:
    assert ran.returncode == 0, ran.stderr
    assert "quickstart_gpt" in (folder / "found.html").read_text(encoding="utf-8")
    assert (folder / "found.png").read_bytes().startswith(b"\x89PNG")
    assert sorted(path.name for path in folder.iterdir()) == ["found.html", "found.png"]


@pytest.mark.slow
@pytest.mark.parametrize(
    ("arguments", "text"),
    [
        (["train.global_batch_size=7"], "train.global_batch_size"),
        (["--html", "no_such_folder/found.html"], "is no folder that can be written"),
        (["sharding.zero_stage=4"], "sharding.zero_stage"),
    ],
)
def test_bad_input_is_told_before_any_rank_starts(
    folder: Path, corpus_file: Path, arguments: list[str], text: str
) -> None:
    ran = bigtrain(folder, "profile", "quickstart_gpt", *OVERRIDES, f"data.source={corpus_file}", *arguments)
    assert (ran.returncode, ran.stdout) == (2, "")
    assert text in ran.stderr
    assert all(line.startswith("error: ") for line in ran.stderr.splitlines())
