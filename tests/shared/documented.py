"""What README and docs/ show: the Python of each page in order, and every command, with the output shown below it."""

from __future__ import annotations

import re
import shlex
from collections.abc import Iterator
from dataclasses import dataclass, field
from pathlib import Path

ROOT = Path(__file__).parents[2]
DOCS = ROOT / "docs"

SHELLS = ("bash", "sh", "console", "")
PROGRAMS = ("bigtrain", "make", "python", "pip", "torchrun", "accelerate", "deepspeed", "srun", "sbatch", "kubectl")
"""Words that begin a command; any other line of a block is output."""

_INCLUSION = re.compile(r'^--8<-- "([^"]+)"$', re.MULTILINE)
_FENCE = re.compile(r"^(?:```(\w*)\n(.*?)^```|<!-- setup:\n(.*?)^-->)$", re.MULTILINE | re.DOTALL)
_INDENTED = re.compile(r"(?:(?<=\n\n)|\A)((?: {4}.*\n?)+)")
_SPAN = re.compile(r"(?<!`)`(bigtrain [^`]+)`(?!`)")
_PLACEHOLDER = re.compile(r"(?<![\w.=-])[A-Z_]{2,}(?![\w=])|\.\.\.|\[")
_EXIT = re.compile(r"# exit code (\d+)")


@dataclass
class Command:
    """A command as a page shows it: its words, the exit code that a comment names, and output shown below it."""

    page: str
    line: int
    words: list[str]
    exit_code: int = 0
    output: list[str] = field(default_factory=list)

    def __str__(self) -> str:
        """Return place and command, for messages."""
        return f"{self.page}:{self.line}: {shlex.join(self.words)}"

    def of_bigtrain(self) -> list[str] | None:
        """Return the words after `bigtrain`, also where another launcher starts it; None if none does."""
        for place, word in enumerate(self.words):
            if word == "bigtrain" and (place == 0 or self.words[place - 1] in ("-m", "--module")):
                return self.words[place + 1 :]
        return None


def pages() -> dict[str, str]:
    """Return the pages of the site by name, with what they include; README is among them as overview.md."""
    texts = {page.relative_to(DOCS).as_posix(): page.read_text(encoding="utf-8") for page in sorted(DOCS.rglob("*.md"))}
    return {name: _INCLUSION.sub(_included, text) for name, text in texts.items()}


def _included(line: re.Match[str]) -> str:
    return (ROOT / line[1]).read_text(encoding="utf-8")


def code(text: str, language: str) -> list[str]:
    """Return the blocks of a language, in order; for Python what a page sets up in comments is among them."""
    return [
        found[2] if found[3] is None else found[3]
        for found in _FENCE.finditer(text)
        if found[1] == language or (found[3] is not None and language == "python")
    ]


def commands(page: str, text: str) -> Iterator[Command]:
    """Yield the commands of a page: those in blocks, then those in running text that are whole."""
    for found in _FENCE.finditer(text):
        if found[3] is None and found[1] in SHELLS:
            yield from _of_block(page, _line(text, found.start()) + 1, found[2])
    rest = _FENCE.sub(lambda found: "\n" * found[0].count("\n"), text)
    for found in _INDENTED.finditer(rest):
        yield from _of_block(page, _line(rest, found.start()), found[1])
    for found in _SPAN.finditer(rest):
        if len(found[1].split()) > 2 and not _PLACEHOLDER.search(found[1]):
            yield Command(page, _line(rest, found.start()), shlex.split(found[1]))


def _line(text: str, place: int) -> int:
    return text.count("\n", 0, place) + 1


def _of_block(page: str, line: int, block: str) -> Iterator[Command]:
    last: Command | None = None
    for shown in _lines(block):
        number, text = line + shown[0], shown[1].strip().removeprefix("$ ").removeprefix(".venv/bin/")
        if text.split(" ")[0] in PROGRAMS:
            if last is not None:
                yield last
            last = Command(page, number, _words(text), _exit_code(text))
        elif last is not None and text:
            last.output.append(text)
    if last is not None:
        yield last


def _lines(block: str) -> Iterator[tuple[int, str]]:
    """Yield the lines of a block with their numbers; those that end with a backslash go on."""
    start, held = 0, ""
    for number, text in enumerate(block.splitlines()):
        start = number if not held else start
        held += text.rstrip()
        if held.endswith("\\"):
            held = held[:-1]
            continue
        yield start, held
        held = ""


def _words(text: str) -> list[str]:
    """Return the words up to a pipe or a redirection."""
    words = shlex.split(text, comments=True)
    end = min((words.index(stop) for stop in ("|", ">", "&&") if stop in words), default=len(words))
    return words[:end]


def _exit_code(text: str) -> int:
    found = _EXIT.search(text)
    return int(found[1]) if found else 0
