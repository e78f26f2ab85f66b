"""Build the documentation site into build/site: strictly, and so that it can be read from a disk without a network.

    python scripts/build_docs.py [FOLDER]    # FOLDER in place of build/

The pages are those of docs/, as mkdocs.yml orders them. Two things are done to them first, on copies in build/pages. A
line `--8<-- "FILE"` is replaced by that file of the repository. And links that lead out of docs/ lead to the page that
holds the file, or else to a copy of the file on the site. A warning of Zensical's, or a missing file, fails the build.
"""

from __future__ import annotations

import os
import re
import shutil
import subprocess
import sys
from collections.abc import Callable
from functools import partial
from pathlib import Path

ROOT = Path(__file__).resolve().parent.parent
DOCS = ROOT / "docs"
INCLUSION = re.compile(r'^--8<-- "([^"]+)"$', re.MULTILINE)
LINK = re.compile(r"(?<=\]\()(?![a-z]+:|#)([^)\s#]+)")
CODE = re.compile(r"^```.*?^```$|`[^`\n]+`", re.MULTILINE | re.DOTALL)
ELSEWHERE = "files"
"""The folder of the site that holds copies of files from outside of docs/."""


def main() -> int:
    """Return what Zensical returned: 0, or 1 for any warning."""
    return build(Path(sys.argv[1]).resolve() if len(sys.argv) > 1 else ROOT / "build")


def build(folder: Path) -> int:
    """Build the site into `site` of a folder, and return 0, or 1 for any warning."""
    pages, site = folder / "pages", folder / "site"
    for old in (pages, site):
        shutil.rmtree(old, ignore_errors=True)
    try:
        stage(pages)
    except FileNotFoundError as error:
        print(f"error: {error}", file=sys.stderr)
        return 1
    config = folder / "mkdocs.yml"
    config.write_text(f"INHERIT: {relative(ROOT / 'mkdocs.yml', folder)}\ndocs_dir: pages\nsite_dir: site\n")
    command = [sys.executable, "-m", "zensical", "build", "--strict", "--clean", "--config-file", str(config)]
    if subprocess.run(command, cwd=folder, check=False).returncode:
        return 1
    print(f"{site / 'index.html'}: written; open it in a browser")
    return 0


def stage(pages: Path) -> None:
    """Copy docs/ to a folder, with files put in and links mended. Raises FileNotFoundError naming what is missing."""
    shutil.copytree(DOCS, pages)
    sources = {page: page.read_text(encoding="utf-8") for page in sorted(DOCS.rglob("*.md"))}
    homes = {ROOT / name: page for page, text in sources.items() for name in INCLUSION.findall(text)}
    for page, text in sources.items():
        whole = INCLUSION.sub(partial(included, page), text)
        staged = pages / page.relative_to(DOCS)
        staged.write_text(relinked(whole, partial(staged_link, pages, page, homes)), encoding="utf-8")


def included(page: Path, line: re.Match[str]) -> str:
    """Return the file that a line of a page names as a part of that page: its links start at the page."""
    file = ROOT / line[1]
    text = file.read_text(encoding="utf-8").rstrip("\n")
    return relinked(text, lambda link: relative(file.parent / link, page.parent))


def staged_link(pages: Path, page: Path, homes: dict[Path, Path], link: str) -> str:
    """Return where a link of a page leads on the site; a file from outside of docs/ that it needs is copied."""
    target = Path(os.path.normpath(page.parent / link))
    if not target.is_file():
        raise FileNotFoundError(f"{page.relative_to(ROOT)}: there is no {link}")
    if target in homes:
        return relative(homes[target], page.parent)
    if target.is_relative_to(DOCS):
        return link
    copy = pages / ELSEWHERE / target.relative_to(ROOT)
    copy = copy.with_name(copy.name + ".txt") if copy.suffix == ".md" else copy
    copy.parent.mkdir(parents=True, exist_ok=True)
    shutil.copyfile(target, copy)
    return relative(copy, (pages / page.relative_to(DOCS)).parent)


def relinked(text: str, change: Callable[[str], str]) -> str:
    """Return Markdown with each relative link changed, apart from those in code."""
    parts: list[str] = []
    end = 0
    for code in CODE.finditer(text):
        parts += [LINK.sub(lambda found: change(found[1]), text[end : code.start()]), code[0]]
        end = code.end()
    return "".join([*parts, LINK.sub(lambda found: change(found[1]), text[end:])])


def relative(target: Path, folder: Path) -> str:
    """Return the way from a folder to a file, as a link has it."""
    return Path(os.path.relpath(target, folder)).as_posix()


if __name__ == "__main__":
    sys.exit(main())
