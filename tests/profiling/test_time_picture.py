"""The page and the picture of where a step's time goes: all numbers are there, and no name ends an element."""

from __future__ import annotations

import dataclasses
import re
from pathlib import Path

import pytest
from taken_apart import Page

from bigtrain.errors import InputError
from bigtrain.planner.by_class import CALLS, MATRIX
from bigtrain.profiling.breakdown import Breakdown
from bigtrain.profiling.time_picture import page, picture
from bigtrain.profiling.time_result import TimeProfile

PROFILE = TimeProfile(
    name="tiny",
    device="a CPU",
    rates="measured here",
    predicted={MATRIX: 0.004, CALLS: 0.002},
    predicted_phases={"forward": 0.006},
    measured=Breakdown(5, 0.01, {MATRIX: 0.008, CALLS: 0.002}, {"forward": 0.01}, {}),
    step_seconds=[0.01],
    recipe="name: tiny\n",
)


def test_the_page_has_every_class_and_its_numbers() -> None:
    text = page(PROFILE)
    assert re.search(r'<th scope="row">matrix products</th><td><b class="bar" style="width:100.00%"></b>', text)
    assert all(f"<td>{cell}</td>" in text for cell in ("8.00 ms", "80.0%", "4.00 ms", "+4.00 ms", "50%"))
    assert "next to look at: matrix products, 4.00 ms above the predicted 4.00 ms" in text
    assert "$" not in text.split("<body>")[1]


def test_the_page_is_well_formed_and_needs_nothing_else() -> None:
    text = page(PROFILE)
    shown = Page(text)
    assert not shown.mismatched
    assert shown.data == PROFILE.as_object()
    assert not re.findall(r"https?:|url\(|@import|\bfetch\(|XMLHttp", text)
    assert "default-src 'none'" in str(shown.attributes("meta", "content"))


def test_names_cannot_end_an_element() -> None:
    bad = dataclasses.replace(PROFILE, name="</script><b>", recipe="</pre><i>", device="<u>")
    assert not re.search(r"</script><b>|</pre><i>|<u>", page(bad))


def test_the_picture_is_written(tmp_path: Path) -> None:
    picture(PROFILE, tmp_path / "p.png")
    assert (tmp_path / "p.png").read_bytes().startswith(b"\x89PNG")
    with pytest.raises(InputError, match="No such file or directory; name another file"):
        picture(PROFILE, tmp_path / "gone" / "p.png")
