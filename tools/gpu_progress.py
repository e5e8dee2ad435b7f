"""A pytest plugin: writes each test's outcome as it ends, and leaves out tests that passed before.

    python -m pytest -p tools.gpu_progress --progress FILE [--leave-out FILE]

JUnit files are written at the end, and a run that is cut off leaves none.
"""

from __future__ import annotations

import json
import pathlib
from typing import Any

import pytest


def pytest_addoption(parser: pytest.Parser) -> None:
    """The files."""
    parser.addoption("--progress", type=pathlib.Path, help="gets a line of JSON per outcome")
    parser.addoption("--leave-out", type=pathlib.Path, help="names of tests, one per line")


def pytest_configure(config: pytest.Config) -> None:
    """Of several processes the one that hears of all tests writes."""
    path = config.getoption("--progress")
    if path and not hasattr(config, "workerinput"):
        config.pluginmanager.register(_Progress(path))


def pytest_collection_modifyitems(config: pytest.Config, items: list[pytest.Item]) -> None:
    """Every process leaves out the same tests: the file does not change while they start."""
    path = config.getoption("--leave-out")
    if not path:
        return
    names = set(path.read_text().splitlines())
    config.hook.pytest_deselected(items=[one for one in items if one.nodeid in names])
    items[:] = [one for one in items if one.nodeid not in names]


class _Progress:
    def __init__(self, path: pathlib.Path) -> None:
        self._path = path

    def pytest_runtest_logreport(self, report: pytest.TestReport) -> None:
        """A test's own outcome, and what went wrong before or after it."""
        if report.when == "call" or report.outcome != "passed":
            line = {"test": report.nodeid, "outcome": report.outcome, "seconds": report.duration}
            with self._path.open("a") as file:
                file.write(json.dumps(line) + "\n")


def passed(path: pathlib.Path) -> list[str]:
    """Names of the tests that passed and had no other outcome, before or after.

    Args:
        path: A file of `--progress`; a last line that was cut off does not count.
    """
    outcomes: dict[str, set[Any]] = {}
    for text in path.read_text().splitlines():
        try:
            line = json.loads(text)
            outcomes.setdefault(str(line["test"]), set()).add(str(line["outcome"]))
        except (KeyError, TypeError, ValueError):  # of the commit, or damaged
            continue
    return [test for test, found in outcomes.items() if found == {"passed"}]
