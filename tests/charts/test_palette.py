"""Colours: both backgrounds have all of them, and what is read stands out from what it is read on."""

from __future__ import annotations

import re
from itertools import combinations

import pytest

from bigtrain.charts.palette import DARK, LIGHT, variables
from bigtrain.memory.report import CAUSES

both = pytest.mark.parametrize("colours", [LIGHT, DARK], ids=["light", "dark"])


def luminance(colour: str) -> float:
    """Return the relative luminance of a colour (Web Content Accessibility Guidelines 2.2)."""
    parts = [int(colour[place : place + 2], 16) / 255 for place in (1, 3, 5)]
    red, green, blue = (part / 12.92 if part <= 0.04045 else ((part + 0.055) / 1.055) ** 2.4 for part in parts)
    return 0.2126 * red + 0.7152 * green + 0.0722 * blue


def contrast(one: str, other: str) -> float:
    low, high = sorted((luminance(one), luminance(other)))
    return (high + 0.05) / (low + 0.05)


def test_both_backgrounds_have_the_same_names() -> None:
    assert LIGHT.keys() == DARK.keys()


def test_each_cause_has_a_colour_of_its_own() -> None:
    names = [f"cause-{number}" for number in range(len(CAUSES))]
    assert [name for name in LIGHT if name.startswith("cause-")] == names
    for colours in (LIGHT, DARK):
        assert len({colours[name] for name in names}) == len(CAUSES)


@both
def test_texts_can_be_read(colours: dict[str, str]) -> None:
    for text in ("text", "quiet"):
        for ground in ("page", "card"):
            assert contrast(colours[text], colours[ground]) >= 4.5, (text, ground)


@both
def test_no_two_causes_look_alike(colours: dict[str, str]) -> None:
    shown = [colour for name, colour in colours.items() if name.startswith("cause-")]
    for one, other in combinations(shown, 2):
        parts = [(int(one[place : place + 2], 16), int(other[place : place + 2], 16)) for place in (1, 3, 5)]
        assert sum(abs(left - right) for left, right in parts) >= 60, (one, other)


def test_every_colour_is_a_variable_twice() -> None:
    text = variables()
    declared = re.findall(r"--([\w-]+): (#[0-9a-f]{6});", text)
    assert declared == [*LIGHT.items(), *DARK.items()]
    assert text.index("prefers-color-scheme: dark") > text.index(LIGHT["page"])
    assert text.count("{") == text.count("}")


def test_causes_are_classes() -> None:
    assert len(re.findall(r"^\.cause-\d \{ fill: var\(--cause-\d\)", variables(), re.MULTILINE)) == len(CAUSES)
