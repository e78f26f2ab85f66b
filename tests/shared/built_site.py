"""The pages of a built site as a reader's browser sees them: what they link to, load, and can be linked at."""

from __future__ import annotations

import re
from collections.abc import Iterator
from dataclasses import dataclass, field
from html.parser import HTMLParser
from pathlib import Path
from urllib.parse import unquote, urlsplit

LOADED = {"script": "src", "img": "src", "iframe": "src", "source": "src", "link": "href"}
"""What a browser fetches by itself, by tag."""

CSS_ADDRESS = re.compile(r"url\(\s*['\"]?([^'\")]+)")


@dataclass
class Page(HTMLParser):
    """One page: addresses that it links to, addresses that it loads, and its anchors."""

    html: str
    links: list[str] = field(default_factory=list)
    loads: list[str] = field(default_factory=list)
    anchors: set[str] = field(default_factory=set)

    def __post_init__(self) -> None:
        """Read the page."""
        super().__init__()
        self.feed(self.html)

    def handle_starttag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        """Note what a tag links to, loads or is called."""
        named = {name: value for name, value in attrs if value is not None}
        self.anchors |= {named[name] for name in ("id", "name") if name in named}
        if tag == "a" and "href" in named:
            self.links.append(named["href"])
        if tag in LOADED and LOADED[tag] in named:
            self.loads.append(named[LOADED[tag]])
        self.loads += CSS_ADDRESS.findall(named.get("style", ""))


def read(site: Path) -> dict[Path, Page]:
    """Return all pages of a site but that for absent ones, whose links start at a server's root."""
    found = {path: Page(path.read_text(encoding="utf-8")) for path in sorted(site.rglob("*.html"))}
    return {path: page for path, page in found.items() if path.name != "404.html"}


def broken(pages: dict[Path, Page]) -> Iterator[str]:
    """Yield each link or load of a page that leads to no file, or to no anchor of a page."""
    for path, page in pages.items():
        for address in [*page.links, *page.loads]:
            parts = urlsplit(address)
            if parts.scheme or parts.netloc:
                continue
            target = (path.parent / unquote(parts.path)).resolve() if parts.path else path
            anchor = unquote(parts.fragment)
            if not target.is_file():
                yield f"{path.name}: {address}: no such file"
            elif anchor and target in pages and anchor not in pages[target].anchors:
                yield f"{path.name}: {address}: no such anchor"


def foreign(site: Path, pages: dict[Path, Page]) -> Iterator[str]:
    """Yield what a page or a style sheet would load from another host."""
    sheets = {path: CSS_ADDRESS.findall(path.read_text(encoding="utf-8")) for path in site.rglob("*.css")}
    for path, addresses in [*((path, page.loads) for path, page in pages.items()), *sheets.items()]:
        for address in addresses:
            if urlsplit(address).netloc or urlsplit(address).scheme not in ("", "data"):
                yield f"{path.name}: {address}"
