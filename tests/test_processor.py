"""What is read from Linux about the processor, on this machine and on others."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path

import pytest

from bigtrain import processor

FLAGS = "flags\t\t: fpu avx2 avx512f"


@pytest.fixture
def cpuinfo(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> Iterator[Path]:
    """Stand in for /proc/cpuinfo; the answers of the tests before and after are not kept."""
    path = tmp_path / "cpuinfo"
    monkeypatch.setattr(processor, "Path", lambda _: path)
    for answer in (processor.has_slow_bf16, processor.has_tiles):
        answer.cache_clear()
    yield path
    for answer in (processor.has_slow_bf16, processor.has_tiles):
        answer.cache_clear()


@pytest.mark.parametrize(
    ("text", "slow"),
    [
        (FLAGS, True),
        (f"{FLAGS} avx512_bf16", False),
        (f"{FLAGS} amx_bf16 amx_tile", False),
        ("Features\t: fp asimd bf16", False),
        ("", False),
    ],
    ids=["x86 without", "avx512", "amx", "arm", "nothing"],
)
def test_bf16_is_slow_only_on_an_x86_without_instructions(cpuinfo: Path, text: str, slow: bool) -> None:
    cpuinfo.write_text(text + "\n")
    assert processor.has_slow_bf16() is slow


def test_tiles_are_of_a_precision(cpuinfo: Path) -> None:
    cpuinfo.write_text(f"{FLAGS} avx512_bf16 avx512_fp16 amx_bf16 amx_tile\n")
    assert processor.has_tiles("bf16") and not processor.has_tiles("fp16")


def test_without_linux_nothing_is_known(cpuinfo: Path) -> None:
    assert not processor.has_slow_bf16() and not processor.has_tiles("bf16")
    assert processor.processor_field("model name") == ""


def test_the_first_processor_counts(cpuinfo: Path) -> None:
    cpuinfo.write_text("processor\t: 0\nmodel name\t: One @ 2:5 GHz\n\nprocessor\t: 1\nmodel name\t: Two\n")
    assert processor.processor_field("model name") == "One @ 2:5 GHz"


def test_a_field_is_known_by_its_whole_name(cpuinfo: Path) -> None:
    cpuinfo.write_text("model name\t: One\nmodel\t\t: 85\n")
    assert processor.processor_field("model") == "85"
    assert processor.processor_field("cache") == ""
