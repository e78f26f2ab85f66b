"""A plugin of pytest: `-p passed_before --passed-before FILE` leaves out what has passed before, by the file's lines.

A session that is killed goes on where it was. Tests that failed or were skipped are not noted: they run again.
"""

from __future__ import annotations

from pathlib import Path

import pytest

OPTION = "--passed-before"


def pytest_addoption(parser: pytest.Parser) -> None:
    parser.addoption(OPTION, type=Path, default=None, metavar="FILE", help="leave out the tests that FILE names")


def pytest_collection_modifyitems(config: pytest.Config, items: list[pytest.Item]) -> None:
    file = config.getoption(OPTION)
    if file is None or not file.is_file():
        return
    passed = set(file.read_text(encoding="utf-8").splitlines())
    config.hook.pytest_deselected(items=[item for item in items if item.nodeid in passed])
    items[:] = [item for item in items if item.nodeid not in passed]


class Noting:
    """Adds a line for each test that passed, as soon as it has: set-up, call and tear-down."""

    def __init__(self, file: Path) -> None:
        self._file = file
        self._unfit: set[str] = set()

    def pytest_runtest_logreport(self, report: pytest.TestReport) -> None:
        if report.outcome != "passed":
            self._unfit.add(report.nodeid)
        elif report.when == "teardown" and report.nodeid not in self._unfit:
            with self._file.open("a", encoding="utf-8") as out:
                out.write(report.nodeid + "\n")


def pytest_configure(config: pytest.Config) -> None:
    file = config.getoption(OPTION)
    if file is not None:
        config.pluginmanager.register(Noting(file))


@pytest.hookimpl(trylast=True)
def pytest_sessionfinish(session: pytest.Session, exitstatus: int) -> None:
    """Where everything has passed before, nothing is collected: that is no failure."""
    file = session.config.getoption(OPTION)
    if exitstatus == pytest.ExitCode.NO_TESTS_COLLECTED and file is not None and file.is_file():
        session.exitstatus = pytest.ExitCode.OK
