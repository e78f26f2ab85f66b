"""House rules that no linter knows: sizes, mirrored tests, words that must not be shipped, an honest lock file."""

from __future__ import annotations

import ast
import re
import subprocess
import tomllib
from collections.abc import Iterator
from functools import cache
from pathlib import Path

import pytest
from packaging.requirements import Requirement
from packaging.utils import canonicalize_name

ROOT = Path(__file__).parent.parent
PACKAGE = ROOT / "bigtrain"
LONGEST_FUNCTION = 60
LONGEST_FILE = 300
UNMIRRORED = {"__init__.py", "__main__.py"}
"""File names without a test file of their own: what they hold is tested through what they export or start."""
PLAIN_EXCEPTIONS = {
    "bigtrain/data/tokenizer.py",
    "bigtrain/models/attention_kernels.py",
    "bigtrain/training/tracking.py",
}
"""Files that translate the errors of libraries which raise `Exception` itself, or whatever they like."""
ONE_FILE_LIBRARIES = ("accelerate", "apex", "deepspeed", "transformers")

# Written in halves, so that this file does not hold what it looks for.
FORBIDDEN = {
    "unfinished work": "TO" + "DO|FIX" + r"ME|\bNotImplemented" + "Error",
    "a path of one machine": r"(?<![\w.~-])/(?:wo" + r"rk|fa" + r"rm|ro" + r"ot|tmp/br" + r"ief)/|\.\./sha" + "red",
    "a package index": "py"
    + r"pi\.org|python"
    + r"hosted\.org|download\.py"
    + r"torch\.org|--(?:extra-)?index"
    + "-url",
    "a folder of packages": "--find" + "-links|file:" + "///",
}

MODULES = sorted(PACKAGE.rglob("*.py"))


def name(path: Path) -> str:
    return path.relative_to(ROOT).as_posix()


each_module = pytest.mark.parametrize("path", MODULES, ids=name)


@cache
def parse(path: Path) -> ast.Module:
    return ast.parse(path.read_text(encoding="utf-8"), str(path))


def repository_texts() -> Iterator[tuple[str, str]]:
    """Yield name and text of every file that is, or would be, committed; those that are not text are left out."""
    listing = ["git", "ls-files", "-z", "--cached", "--others", "--exclude-standard"]
    names = subprocess.run(listing, cwd=ROOT, capture_output=True, text=True, check=True).stdout.split("\0")
    for path in (ROOT / name for name in sorted(filter(None, names))):
        if path.is_file() and b"\0" not in (content := path.read_bytes()):
            yield name(path), content.decode("utf-8")


def functions(tree: ast.Module) -> Iterator[ast.FunctionDef | ast.AsyncFunctionDef]:
    return (node for node in ast.walk(tree) if isinstance(node, ast.FunctionDef | ast.AsyncFunctionDef))


def lines(node: ast.FunctionDef | ast.AsyncFunctionDef) -> int:
    return (node.end_lineno or node.lineno) - node.lineno + 1


def caught(handler: ast.ExceptHandler) -> set[str]:
    """Return the names that a handler catches; a bare `except` catches everything."""
    if handler.type is None:
        return {"BaseException"}
    types = handler.type.elts if isinstance(handler.type, ast.Tuple) else [handler.type]
    return {ast.unparse(kind) for kind in types}


def passes_on(handler: ast.ExceptHandler) -> bool:
    """Tell whether a handler raises again, or hands the exception that it named to someone else."""
    inside = [node for statement in handler.body for node in ast.walk(statement)]
    named = any(isinstance(node, ast.Name) and node.id == handler.name for node in inside)
    return named or any(isinstance(node, ast.Raise) for node in inside)


def imported_libraries(tree: ast.Module) -> set[str]:
    found = {alias.name for node in ast.walk(tree) if isinstance(node, ast.Import) for alias in node.names}
    found |= {node.module or "" for node in ast.walk(tree) if isinstance(node, ast.ImportFrom) and node.level == 0}
    return {module.partition(".")[0] for module in found}


def locked() -> dict[str, str]:
    text = (ROOT / "requirements.lock").read_text(encoding="utf-8")
    pins = re.findall(r"^([A-Za-z0-9._-]+)==([^\s;]+)", text, re.MULTILINE)
    return {canonicalize_name(library): version for library, version in pins}


def required() -> Iterator[Requirement]:
    project = tomllib.loads((ROOT / "pyproject.toml").read_text(encoding="utf-8"))["project"]
    extras = project["optional-dependencies"]
    for line in (*project["dependencies"], *extras["hf"], *extras["dev"]):
        yield Requirement(line)


@each_module
def test_functions_are_short(path: Path) -> None:
    long = {node.name: lines(node) for node in functions(parse(path)) if lines(node) > LONGEST_FUNCTION}
    assert not long


@each_module
def test_file_is_short(path: Path) -> None:
    assert len(path.read_text(encoding="utf-8").splitlines()) <= LONGEST_FILE


@each_module
def test_catches_what_it_knows(path: Path) -> None:
    for node in ast.walk(parse(path)):
        if isinstance(node, ast.ExceptHandler):
            broad = caught(node) & {"Exception", "BaseException"}
            assert "Exception" not in broad or name(path) in PLAIN_EXCEPTIONS, f"line {node.lineno} catches Exception"
            assert not broad or passes_on(node), f"line {node.lineno} swallows everything"


@each_module
def test_public_names_have_docstrings(path: Path) -> None:
    tree = parse(path)
    kinds = ast.FunctionDef | ast.AsyncFunctionDef | ast.ClassDef
    public = [node for node in tree.body if isinstance(node, kinds) and not node.name.startswith("_")]
    assert ast.get_docstring(tree), "the module has no docstring"
    assert not [node.name for node in public if not ast.get_docstring(node)]


@pytest.mark.parametrize("path", [path for path in MODULES if path.name not in UNMIRRORED], ids=name)
def test_has_a_test_file(path: Path) -> None:
    inside = path.relative_to(PACKAGE)
    mirrored = ROOT / "tests" / inside.with_name(f"test_{inside.name}")
    assert mirrored.is_file(), f"{name(mirrored)} is missing"


@pytest.mark.parametrize("library", ONE_FILE_LIBRARIES)
def test_imported_in_one_file_at_most(library: str) -> None:
    assert len([name(path) for path in MODULES if library in imported_libraries(parse(path))]) <= 1


@pytest.mark.parametrize("kind", FORBIDDEN)
def test_no_file_holds(kind: str) -> None:
    pattern = re.compile(FORBIDDEN[kind])
    found = [
        f"{file}:{number}: {line.strip()[:100]}"
        for file, text in repository_texts()
        for number, line in enumerate(text.splitlines(), 1)
        if pattern.search(line)
    ]
    assert not found, "\n".join(found)


def test_license_is_whole() -> None:
    text = (ROOT / "LICENSE").read_text(encoding="utf-8")
    assert "Apache License\n                           Version 2.0" in text
    assert "END OF TERMS AND CONDITIONS" in text


def test_lock_pins_what_the_project_requires() -> None:
    pins = locked()
    wrong = [
        str(requirement)
        for requirement in required()
        if (library := canonicalize_name(requirement.name)) not in {"bigtrain", "torch"}
        and (library not in pins or pins[library] not in requirement.specifier)
    ]
    assert not wrong


def test_lock_leaves_torch_to_the_machine() -> None:
    of_the_machine = re.compile(r"torch$|triton$|nvidia-|cuda-")
    assert not [library for library in locked() if of_the_machine.match(library)]


def test_lock_hashes_every_pin() -> None:
    text = (ROOT / "requirements.lock").read_text(encoding="utf-8")
    blocks = re.split(r"^(?=[A-Za-z])", text, flags=re.MULTILINE)[1:]
    assert not [block.splitlines()[0] for block in blocks if "--hash=sha256:" not in block]


def test_torch_of_the_makefile_is_admitted() -> None:
    made = re.search(r"^TORCH \?= torch==(\S+)$", (ROOT / "Makefile").read_text(encoding="utf-8"), re.MULTILINE)
    ranges = next(requirement for requirement in required() if requirement.name == "torch")
    assert made
    assert made[1] in ranges.specifier


def probe(source: str) -> ast.ExceptHandler:
    tree = ast.parse(source)
    return next(node for node in ast.walk(tree) if isinstance(node, ast.ExceptHandler))


@pytest.mark.parametrize(
    ("clause", "names"),
    [
        ("except:", {"BaseException"}),
        ("except Exception:", {"Exception"}),
        ("except (OSError, Exception) as error:", {"OSError", "Exception"}),
        ("except json.JSONDecodeError:", {"json.JSONDecodeError"}),
    ],
)
def test_handlers_are_read(clause: str, names: set[str]) -> None:
    assert caught(probe(f"try:\n    f()\n{clause}\n    pass")) == names


@pytest.mark.parametrize(
    ("body", "passed"), [("raise", True), ("queue.put(error)", True), ("pass", False), ("log('failed')", False)]
)
def test_handing_on_is_told_from_swallowing(body: str, passed: bool) -> None:
    assert passes_on(probe(f"try:\n    f()\nexcept BaseException as error:\n    {body}")) is passed


@pytest.mark.parametrize(
    ("kind", "line"),
    [
        ("unfinished work", "# TO" + "DO: later"),
        ("a path of one machine", "see /wo" + "rk/main"),
        ("a path of one machine", "open('/ro" + "ot/data')"),
        ("a package index", "--index" + "-url x"),
        ("a folder of packages", "--find" + "-links x"),
    ],
)
def test_forbidden_is_found(kind: str, line: str) -> None:
    assert re.search(FORBIDDEN[kind], line)


@pytest.mark.parametrize("line", ["network/" + "root/x", "a frame/" + "work/y", "todo", "~/" + "work/x", "exploring"])
def test_ordinary_text_is_let_through(line: str) -> None:
    assert not any(re.search(pattern, line) for pattern in FORBIDDEN.values())
