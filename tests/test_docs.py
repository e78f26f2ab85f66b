"""The documentation site: it builds without a warning, every link leads somewhere, nothing is loaded from elsewhere."""

from __future__ import annotations

import json
import re
import shutil
import subprocess
import sys
from pathlib import Path

import pytest
import yaml
from built_site import Page, broken, foreign, read

ROOT = Path(__file__).parents[1]
CHROMIUM = shutil.which("chromium")
MUST_BE_THERE = (
    "index",
    "recipes",
    "reference",
    "fit",
    "memory",
    "scaling",
    "reliability",
    "loops",
    "data",
    "deployment",
)

# Opens each page in a frame, one after another, then searches; what is found is told on the console.
PROBE = """<!doctype html><body><script>
const pages = PAGES, frame = document.body.appendChild(document.createElement("iframe"));
frame.width = 1200; frame.height = 800;
const inside = (root, wanted) => [...root.querySelectorAll(wanted),
  ...[...root.querySelectorAll("*")].filter((one) => one.shadowRoot).flatMap((one) => inside(one.shadowRoot, wanted))];
const until = (found) => new Promise((done) => {
  const look = () => found() ? done(found()) : setTimeout(look, 50);
  look();
});
(async () => {
  for (const page of pages) {
    await new Promise((loaded) => { frame.onload = loaded; frame.src = page; });
    const shown = frame.contentDocument;
    const absent = [...shown.images].filter((image) => !image.naturalWidth).map((image) => image.src);
    console.log("probe: " + page + ": " + shown.querySelector("h1").firstChild.textContent + " " + absent.join(" "));
  }
  const shown = frame.contentDocument;
  shown.querySelector("label[for=__search]").click();
  const input = await until(() => inside(shown, "input[role=combobox]")[0]);
  input.value = "zero_stage";
  input.dispatchEvent(new InputEvent("input", { bubbles: true }));
  const first = await until(() => inside(shown, "a[href*='h=']")[0]);
  console.log("probe: found " + first.getAttribute("href"));
})();
</script></body>
"""


@pytest.fixture(scope="module")
def site(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Build the site once; return its folder."""
    folder = tmp_path_factory.mktemp("docs")
    command = [sys.executable, str(ROOT / "scripts" / "build_docs.py"), str(folder)]
    built = subprocess.run(command, capture_output=True, text=True, check=False)
    assert built.returncode == 0, built.stdout + built.stderr
    assert "No issues found" in built.stdout + built.stderr
    return folder / "site"


@pytest.fixture(scope="module")
def pages(site: Path) -> dict[Path, Page]:
    return read(site)


@pytest.mark.slow
def test_the_pages_are_there(site: Path, pages: dict[Path, Page]) -> None:
    sources = {path.relative_to(ROOT / "docs").with_suffix("") for path in (ROOT / "docs").rglob("*.md")}
    assert {path.relative_to(site).with_suffix("") for path in pages} == sources
    assert {Path(name) for name in MUST_BE_THERE} <= sources


@pytest.mark.slow
def test_every_link_leads_somewhere(pages: dict[Path, Page]) -> None:
    assert not list(broken(pages))


@pytest.mark.slow
def test_nothing_is_loaded_from_elsewhere(site: Path, pages: dict[Path, Page]) -> None:
    assert not list(foreign(site, pages))


@pytest.mark.slow
def test_every_page_can_be_reached(site: Path, pages: dict[Path, Page]) -> None:
    reached, waiting = set(), [site / "index.html"]
    while waiting:
        path = waiting.pop()
        if path in reached or path not in pages:
            continue
        reached.add(path)
        waiting += [(path.parent / link.partition("#")[0]).resolve() for link in pages[path].links if link[:1] != "#"]
    assert reached == set(pages)


@pytest.mark.slow
@pytest.mark.skipif(CHROMIUM is None, reason="no chromium on PATH")
def test_pages_open_from_a_disk_in_a_browser(site: Path, pages: dict[Path, Page], tmp_path: Path) -> None:
    names = [path.relative_to(site).as_posix() for path in pages]
    (site / "probe.html").write_text(PROBE.replace("PAGES", json.dumps(names)))
    switches = ["--headless", "--no-sandbox", "--disable-gpu", "--disable-quic", "--no-first-run", "--disable-sync"]
    offline = [
        "--disable-background-networking",
        "--disable-component-update",
        f"--user-data-dir={tmp_path / 'profile'}",
    ]
    frames = ["--allow-file-access-from-files", "--enable-logging=stderr", "--virtual-time-budget=60000", "--dump-dom"]
    command = [str(CHROMIUM), *switches, *offline, *frames, (site / "probe.html").as_uri()]
    opened = subprocess.run(command, capture_output=True, text=True, check=False, timeout=120)
    told = re.findall(r'CONSOLE[:(]\d+\)?\] "(.*)", source', opened.stderr)
    if not told and "probe" not in opened.stdout:
        pytest.skip("this chromium may not read files here")
    titles = {
        line.split(": ")[1]: line.split(": ")[2] for line in told if line.startswith("probe: ") and ".html: " in line
    }
    assert set(titles) == set(names), told
    assert titles["memory.html"] == "Memory "
    assert not [line for line in titles.values() if "file:" in line], "a picture is absent"
    assert any(line.startswith("probe: found ") for line in told), "the search finds nothing"
    assert not [line for line in told if not line.startswith("probe: ")], "a page complains"


def test_the_menu_names_every_page() -> None:
    def leaves(menu: object) -> list[str]:
        if isinstance(menu, str):
            return [menu]
        parts = menu.values() if isinstance(menu, dict) else menu
        return [leaf for part in parts for leaf in leaves(part)]

    named = leaves(yaml.safe_load((ROOT / "mkdocs.yml").read_text(encoding="utf-8"))["nav"])
    assert sorted(named) == sorted(path.relative_to(ROOT / "docs").as_posix() for path in (ROOT / "docs").rglob("*.md"))


def test_broken_links_and_foreign_addresses_are_found(tmp_path: Path) -> None:
    (tmp_path / "a.html").write_text(
        '<a href="b.html#here">x</a><a href="b.html#gone">x</a><a href="c.html">x</a><a href="https://a.test">x</a>'
        '<a href="#top">x</a><img src="no.png"><script src="https://b.test/x.js"></script>'
    )
    (tmp_path / "b.html").write_text('<h1 id="here">b</h1><link rel="stylesheet" href="s.css">')
    (tmp_path / "s.css").write_text("a{background:url(//c.test/x.png)} b{background:url('data:image/png;base64,')}")
    found = read(tmp_path)
    assert list(broken(found)) == [
        "a.html: b.html#gone: no such anchor",
        "a.html: c.html: no such file",
        "a.html: #top: no such anchor",
        "a.html: no.png: no such file",
    ]
    assert list(foreign(tmp_path, found)) == ["a.html: https://b.test/x.js", "s.css: //c.test/x.png"]
