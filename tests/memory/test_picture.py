"""The profile's page and picture: whole, self-contained, safe; numbers the profile's, in a browser too."""

from __future__ import annotations

import copy
import json
import math
import re
import shutil
import subprocess
from pathlib import Path
from typing import Any

import pytest
from taken_apart import Page

from bigtrain.charts.axis import short_seconds
from bigtrain.charts.lines import LONGEST_LINE
from bigtrain.charts.plot import DOTS_PER_INCH
from bigtrain.errors import InputError
from bigtrain.memory.picture import page, picture
from bigtrain.memory.profiled import STACKED, ProfileObject, TimelineObject, totals
from bigtrain.memory.report import CAUSES
from bigtrain.units import format_bytes

CHROMIUM = shutil.which("chromium")
MIB = 2**20
BLOCKS = 6
ROWS = 900


def memory(**by_cause: int) -> dict[str, Any]:
    return {
        "allocated_bytes_peak": sum(by_cause.values()),
        "reserved_bytes_peak": None,
        "device_bytes_peak": None,
        "host_bytes_peak": None,
        "by_cause": {cause: by_cause.get(cause, 0) for cause in CAUSES},
    }


def timeline(rows: int, *, scale: float = 1.0) -> TimelineObject:
    """Return a step whose activations rise and fall while gradients come; it ends with the update."""
    forward, backward = rows * 2 // 5, rows * 9 // 10
    causes: dict[str, list[int]] = {cause: [0] * rows for cause in CAUSES}
    labels = []
    for row in range(rows):
        falling = max(0.0, (row - forward) / (backward - forward))
        phase = "forward" if row < forward else "backward" if row < backward else "update"
        block = min(BLOCKS - 1, row * BLOCKS // forward) if row < forward else int(BLOCKS * max(0.0, 0.999 - falling))
        labels.append("update" if phase == "update" else f"blocks.{block} {phase}")
        causes["weights"][row] = 64 * MIB
        causes["optimizer_state"][row] = 128 * MIB
        causes["gradients"][row] = round(64 * MIB * min(1.0, falling))
        causes["activations"][row] = round(scale * 200 * MIB * max(0.0, min(row / forward, 1 - falling)))
        causes["temporaries"][row] = round(8 * MIB * (1 + math.sin(row)))
    return {"time": [row / max(1, rows - 1) for row in range(rows)], "causes": causes, "label": labels}


@pytest.fixture
def profile() -> ProfileObject:
    sides = {"predicted": timeline(ROWS), "measured": timeline(ROWS // 2, scale=1.002)}
    reports = {}
    for side, columns in sides.items():
        row = totals(columns).index(max(totals(columns)))
        reports[side] = memory(**{cause: sizes[row] for cause, sizes in columns["causes"].items()})
    peaks = [reports[side]["allocated_bytes_peak"] for side in ("predicted", "measured")]
    return {
        "name": "tiny_gpt",
        "device": "A <fast> CPU",
        "predicted": reports["predicted"],
        "measured": reports["measured"],
        "relative_error": peaks[0] / peaks[1] - 1,
        "blocks": [
            {"name": f"blocks.{block}", "predicted_bytes": (60 + block) * MIB, "measured_bytes": 61 * MIB}
            for block in range(BLOCKS)
        ],
        "timeline": sides,
        "changes": [
            {"change": "recompute.policy=full", "bytes": -150 * MIB, "tokens_per_second": -0.243},
            {"change": "optimizer.state=8bit", "bytes": -96 * MIB, "tokens_per_second": None},
        ],
        "recipe": "name: tiny_gpt\nmodel: {family: gpt}\n",
        "versions": {"bigtrain": "0.1.0", "torch": "2.13.0"},
    }


def test_page_is_well_formed(profile: ProfileObject) -> None:
    shown = Page(page(profile))
    assert not shown.mismatched
    names = [attributes["id"] for _, attributes in shown.elements if "id" in attributes]
    assert len(set(names)) == len(names)
    assert "$" not in "".join(shown.inside("h1") + shown.inside("style") + shown.inside("p"))
    assert set(shown.attributes("svg", "aria-labelledby")) <= set(names)
    assert set(shown.attributes("svg", "aria-describedby")) <= set(names)


def test_page_needs_nothing_else(profile: ProfileObject) -> None:
    text = page(profile)
    assert not re.findall(r"https?:|url\(|@import|\bfetch\(|XMLHttp", text)
    shown = Page(text)
    assert not [tag for tag, attributes in shown.elements if attributes.keys() & {"src", "href"}]
    assert "default-src 'none'" in str(shown.attributes("meta", "content"))


def test_numbers_are_the_profiles(profile: ProfileObject) -> None:
    profile["timeline"]["predicted"] = timeline(LONGEST_LINE)
    assert Page(page(profile)).data == json.loads(json.dumps(profile))


def test_long_timelines_are_thinned_and_keep_their_peak(profile: ProfileObject) -> None:
    profile["timeline"] = {"predicted": timeline(30_000), "measured": timeline(20_000)}
    text = page(profile)
    data = Page(text).data
    for side, columns in profile["timeline"].items():
        kept = data["timeline"][side]
        assert len(kept["time"]) <= LONGEST_LINE
        assert max(totals(kept)) == max(totals(columns))
    assert {key: value for key, value in data.items() if key != "timeline"} == {
        key: value for key, value in profile.items() if key != "timeline"
    }
    assert len(text) < 400_000


def test_figures_hold_exact_values(profile: ProfileObject) -> None:
    profile["measured"]["device_bytes_peak"] = 700 * MIB
    profile["measured_step_seconds"] = 0.0381
    profile["predicted_step_seconds"] = 0.0402
    text = page(profile)
    peaks = [profile[side]["allocated_bytes_peak"] for side in ("predicted", "measured")]
    wanted = [*peaks, profile["relative_error"], 700 * MIB, 0.0381]
    assert Page(text).attributes("data", "value") == list(map(str, wanted))
    assert f"{format_bytes(abs(peaks[0] - peaks[1]))} {'more' if peaks[0] > peaks[1] else 'less'} than measured" in text
    assert f"predicted {short_seconds(0.0402)}" in text


def test_a_prediction_may_be_exact(profile: ProfileObject) -> None:
    profile["predicted"], profile["relative_error"] = copy.deepcopy(profile["measured"]), 0.0
    assert "to the byte" in page(profile)
    assert "0%" in Page(page(profile)).inside("data")


@pytest.mark.parametrize(
    ("error", "text"),
    [(-0.0123, "-1.230%"), (0.00004, "+0.004%"), (-4e-7, "less than 0.001%"), (1e-9, "less than 0.001%")],
)
def test_errors_are_never_rounded_to_none(profile: ProfileObject, error: float, text: str) -> None:
    profile["relative_error"] = error
    assert text in Page(page(profile)).inside("data")


def test_causes_stand_beside_each_other(profile: ProfileObject) -> None:
    shown = Page(page(profile))
    cells = shown.inside("td")
    for cause in ("weights", "activations"):
        predicted, measured = (format_bytes(profile[side]["by_cause"][cause]) for side in ("predicted", "measured"))
        place = cells.index(predicted)
        assert measured in cells[place : place + 2] or cells[place + 1] == measured
    assert "communication" not in shown.inside("th")
    assert "optimizer state" in shown.inside("th")


def test_bars_are_as_long_as_their_sizes(profile: ProfileObject) -> None:
    styles = [
        (str(attributes["class"]), float(str(attributes["style"]).removeprefix("width:").removesuffix("%")))
        for tag, attributes in Page(page(profile)).elements
        if tag == "b"
    ]
    blocks = [width for style, width in styles if style == "bar main"]
    assert blocks[::2] == pytest.approx([100 * (60 + block) / 65 for block in range(BLOCKS)], abs=0.006)
    assert blocks[1::2] == pytest.approx([100 * 61 / 65] * BLOCKS, abs=0.006)
    held = profile["predicted"]["by_cause"]
    widths = dict(styles)
    weights, state = (widths[f"bar cause-{CAUSES.index(cause)}"] for cause in ("weights", "optimizer_state"))
    assert state / weights == pytest.approx(held["optimizer_state"] / held["weights"], abs=0.001)


def test_changes_say_what_they_do(profile: ProfileObject) -> None:
    shown = Page(page(profile))
    assert shown.inside("code") == ["recompute.policy=full", "optimizer.state=8bit"]
    cells = shown.inside("td")
    assert cells[-4:] == ["-150.00 MiB", "-24.3%", "-96.00 MiB", "not predicted"]


def test_there_may_be_no_change(profile: ProfileObject) -> None:
    profile["changes"] = []
    assert any("No change" in text for text in Page(page(profile)).inside("p"))


def test_a_side_may_be_missing(profile: ProfileObject, tmp_path: Path) -> None:
    del profile["timeline"]["measured"]
    profile["recipe"] = None
    shown = Page(page(profile))
    assert shown.attributes("svg", "data-stack") == ["predicted"]
    assert not shown.inside("summary")
    profile["timeline"] = {}
    profile["blocks"] = []
    assert not Page(page(profile)).mismatched
    picture(profile, tmp_path / "x.png")


@pytest.mark.parametrize(
    "hostile", ["</script><script>alert(1)</script>", "<!--", "</pre><b>", "&lt;", "$name ${name}"]
)
def test_texts_of_others_stay_text(profile: ProfileObject, hostile: str) -> None:
    def named(text: str) -> Page:
        other = copy.deepcopy(profile)
        other.update(name=text, device=text, recipe=text, versions={text: text})
        other["blocks"][0]["name"] = other["changes"][0]["change"] = text
        labels = other["timeline"]["predicted"]["label"]
        labels[:] = [f"{text} {label}" for label in labels]
        return Page(page(other))

    quiet, loud = named("quiet"), named(hostile)
    assert [tag for tag, _ in loud.elements] == [tag for tag, _ in quiet.elements]
    assert hostile in "".join(loud.inside("pre"))
    assert loud.data["name"] == hostile


def test_picture_is_png(profile: ProfileObject, tmp_path: Path) -> None:
    picture(profile, tmp_path / "profile.png")
    content = (tmp_path / "profile.png").read_bytes()
    assert content.startswith(b"\x89PNG")
    assert len(content) > 20_000


def test_picture_of_many_parts_is_no_wider(profile: ProfileObject, tmp_path: Path) -> None:
    profile["timeline"] = {}
    profile["blocks"] = [
        {"name": f"blocks.{block}", "predicted_bytes": MIB, "measured_bytes": MIB} for block in range(200)
    ]
    picture(profile, tmp_path / "x.png")
    assert int.from_bytes((tmp_path / "x.png").read_bytes()[16:20], "big") == 13 * DOTS_PER_INCH


def test_picture_that_cannot_be_written_is_the_users_fault(profile: ProfileObject, tmp_path: Path) -> None:
    with pytest.raises(InputError, match="name another file"):
        picture(profile, tmp_path / "absent" / "profile.png")


@pytest.mark.slow
@pytest.mark.skipif(CHROMIUM is None, reason="no chromium on PATH")
def test_pointing_at_the_timeline_shows_what_is_alive(profile: ProfileObject, tmp_path: Path) -> None:
    ask = (
        "<script>const asked = {};"
        'for (const svg of document.querySelectorAll("svg[data-stack]")) {'
        "const box = svg.getBoundingClientRect(), tip = () => svg.parentElement.querySelector('.tip');"
        'svg.dispatchEvent(new PointerEvent("pointermove", {clientX: box.left + box.width * 0.3}));'
        "asked[svg.dataset.stack] = [tip().textContent];"
        'svg.dispatchEvent(new KeyboardEvent("keydown", {key: "End"}));'
        "asked[svg.dataset.stack].push(tip().textContent);"
        'svg.dispatchEvent(new KeyboardEvent("keydown", {key: "ArrowLeft"}));'
        "asked[svg.dataset.stack].push(tip().textContent);"
        'svg.dispatchEvent(new PointerEvent("pointerleave"));'
        "asked[svg.dataset.stack].push(tip().hidden);"
        "}"
        "const numbers = JSON.parse(document.getElementById('data').textContent);"
        "document.body.insertAdjacentHTML('beforeend', '<pre id=asked></pre>');"
        "document.getElementById('asked').textContent = JSON.stringify({asked, numbers});</script></body>"
    )
    path = tmp_path / "profile.html"
    path.write_text(page(profile).replace("</body>", ask))
    dom, errors = browse(path, tmp_path / "browser")
    shown = Page(dom)
    if shown.inside("h1") != ["tiny_gpt: memory of one step"]:
        pytest.skip("this chromium may not read files here")
    assert not errors
    found = json.loads(shown.inside("pre")[-1])
    assert found["numbers"] == Page(page(profile)).data
    axis = json.loads(shown.inside("script")[1])["stacks"]["predicted"]
    for side, (pointed, end, before, hidden) in found["asked"].items():
        columns = found["numbers"]["timeline"][side]
        _, _, left, right = axis["axis"]
        time = (0.3 * axis["width"] - left) / (right - left)
        row = max(place for place, when in enumerate(columns["time"]) if when <= time + 1e-3)
        assert pointed in (alive(columns, row), alive(columns, row - 1))
        assert end == alive(columns, len(columns["time"]) - 1)
        assert before == alive(columns, len(columns["time"]) - 2)
        assert hidden is True


@pytest.mark.slow
@pytest.mark.skipif(CHROMIUM is None, reason="no chromium on PATH")
def test_an_error_on_a_page_is_noticed(tmp_path: Path) -> None:
    path = tmp_path / "broken.html"
    path.write_text("<h1>broken</h1><script>absent.function()</script>")
    dom, errors = browse(path, tmp_path / "browser")
    if Page(dom).inside("h1") != ["broken"]:
        pytest.skip("this chromium may not read files here")
    assert any("absent is not defined" in error for error in errors)


def alive(columns: dict[str, Any], row: int) -> str:
    """Return what the page says of a row."""
    held = [(cause, columns["causes"][cause][row]) for cause in STACKED[::-1] if columns["causes"][cause][row]]
    lines = [f"{100 * columns['time'][row]:.1f}% of the step, {columns['label'][row]}"]
    lines.append(f"{in_bytes(sum(size for _, size in held))} alive")
    return "\n".join([*lines, *(f"{cause.replace('_', ' ')}  {in_bytes(size)}" for cause, size in held)])


def in_bytes(size: int) -> str:
    value, unit = float(size), 0
    while value >= 1024:
        value, unit = value / 1024, unit + 1
    return f"{value:.3f} {['B', 'KiB', 'MiB', 'GiB'][unit]}" if unit else f"{size} B"


def browse(path: Path, folder: Path) -> tuple[str, list[str]]:
    """Return the page as it stands in a browser once its scripts have run, and what its console says."""
    switches = ["--headless", "--no-sandbox", "--disable-gpu", "--disable-quic", "--no-first-run", "--disable-sync"]
    offline = ["--disable-background-networking", "--disable-component-update", f"--user-data-dir={folder}"]
    command = [str(CHROMIUM), *switches, *offline, "--enable-logging=stderr", "--dump-dom", path.as_uri()]
    done = subprocess.run(command, capture_output=True, text=True, check=False, timeout=60)
    return done.stdout, [line for line in done.stderr.splitlines() if "CONSOLE" in line]
