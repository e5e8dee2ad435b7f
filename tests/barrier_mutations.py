"""Removes each barrier wait, arrival, commit or copy wait of the Mosaic kernels in turn.

    python -m tests.barrier_mutations            # the table: which removal is caught, how, by what

A call site is found by tracing: a pytest plugin (this module) stands in for the functions of
`plgpu` in `SYNCHRONIZATION` while tests of the kernels run in the interpreter, which looks for
races. One run records the sites that each test reaches; then, a process for each, the tests that
reach a site run without it, until one of them fails, or hangs, as a deadlock does. Sites that the
source has and no test reaches must be in `UNREACHED`.
"""

from __future__ import annotations

import argparse
import ast
import dataclasses
import functools
import json
import os
import pathlib
import re
import subprocess
import sys
import tempfile
import time
from collections.abc import Iterable, Iterator, Sequence
from typing import Any, NamedTuple

from jax.experimental.pallas import mosaic_gpu as plgpu

from pallas_kernels import interruption

try:
    import pytest
except ImportError:
    sys.exit("python -m tests.barrier_mutations: needs pytest: pip install pytest")

ROOT = pathlib.Path(__file__).parent.parent
KERNEL_TESTS = "tests/test_kernels_interpreted.py"
SYNCHRONIZATION = (
    "barrier_arrive",
    "barrier_wait",
    "commit_smem",
    "semaphore_signal",
    "semaphore_wait",
    "wait_smem_to_gmem",
    "wgmma_wait",
)
_HOPPER = "pallas_kernels.mosaic.hopper"
UNSEEN = {
    "wgmma_wait": "the interpreter multiplies at once",
    f"commit_smem in {_HOPPER}.tile_queue.TileQueue.put": (
        "the interpreter has one thread for a warpgroup; racecheck reports the removal"
    ),
}
"""Operations, or operations in one function, whose removal the interpreter cannot show, and why."""

_NO_ATOMICS = "the interpreter has no semaphores or atomics; there, the scheduler is static"
UNREACHED = {
    f"barrier_arrive in {_HOPPER}.pipeline.Pipeline._commit._landed": (
        "the interpreter has no cp.async; there, rows are gathered beforehand"
    ),
    f"barrier_arrive in {_HOPPER}.tile_queue.TileQueue.put_by_warp": _NO_ATOMICS,
    f"barrier_arrive in {_HOPPER}.tile_queue.TileQueue.release_by_warp": _NO_ATOMICS,
    f"barrier_wait in {_HOPPER}.tile_queue.TileQueue.read_by_warp": _NO_ATOMICS,
    f"barrier_wait in {_HOPPER}.tile_queue.TileQueue.wait_empty_by_warp": _NO_ATOMICS,
    f"commit_smem in {_HOPPER}.split_k.PartialSums.publish._signal": _NO_ATOMICS,
}
"""Operations in functions that no interpreted test can reach, and why."""

_RECORD, _REMOVE = "BARRIER_MUTATIONS_RECORD", "BARRIER_MUTATIONS_REMOVE"
_FIRST_ONLY = "BARRIER_MUTATIONS_FIRST_ONLY"
_LEAST_SECONDS = 45.0  # before a silent run counts as hung; four times its clean run if longer


class Site(NamedTuple):
    """One call in the source of a kernel."""

    operation: str
    module: str
    function: str
    line: int

    def __str__(self) -> str:
        """For people: operation, module, line."""
        return f"{self.operation} at {self.module}:{self.line}"

    @property
    def place(self) -> str:
        """The site without its line, which any edit moves."""
        return f"{self.operation} in {self.module}.{self.function.replace('<locals>.', '')}"


@dataclasses.dataclass(frozen=True)
class Verdict:
    """What removing one site did.

    Attributes:
        site: The call removed.
        how: "hang", "race", "wrong result" or the interpreter's error; None where all passed.
        test: The test that caught it.
    """

    site: Site
    how: str | None
    test: str | None

    @property
    def excuse(self) -> str | None:
        """Why it may stay unseen, if it may."""
        return UNSEEN.get(self.site.operation) or UNSEEN.get(self.site.place)

    def __str__(self) -> str:
        """One line of the table."""
        if self.how is None:
            return f"{self.site}: NOT SEEN ({self.excuse or 'unexplained'})"
        return f"{self.site}: {self.how} [{self.test.partition('::')[2]}]"


def places_in_the_source() -> set[str]:
    """The place of every call of `SYNCHRONIZATION` in the Mosaic kernels, reached or not."""
    found: set[str] = set()
    for path in sorted((ROOT / "pallas_kernels" / "mosaic").rglob("*.py")):
        module = ".".join(path.relative_to(ROOT).with_suffix("").parts)
        _collect(ast.parse(path.read_text()), (), module, found)
    return found


def _collect(node: ast.AST, scopes: tuple[str, ...], module: str, found: set[str]) -> None:
    if isinstance(node, ast.FunctionDef | ast.ClassDef):
        scopes = (*scopes, node.name)
    called = node.func if isinstance(node, ast.Call) else None
    if isinstance(called, ast.Attribute) and called.attr in SYNCHRONIZATION:
        found.add(f"{called.attr} in {module}.{'.'.join(scopes)}")
    for child in ast.iter_child_nodes(node):
        _collect(child, scopes, module, found)


def record(*, first_only: bool = False) -> dict[Site, dict[str, float]]:
    """Runs the kernels' tests as they are.

    Args:
        first_only: Only the first case of each test function, which takes seconds.

    Returns:
        For each site the tests that reach it, with their seconds.
    """
    with tempfile.TemporaryDirectory() as folder:
        path = pathlib.Path(folder, "sites.json")
        options = {_RECORD: str(path), **({_FIRST_ONLY: "1"} if first_only else {})}
        code, output = _pytest([KERNEL_TESTS], options, timeout=900)
        if code:
            raise RuntimeError(f"the kernels' tests fail as they are:\n{output[-4000:]}")
        found: dict[Site, dict[str, float]] = {}
        for test, (seconds, sites) in json.loads(path.read_text()).items():
            for site in sites:
                found.setdefault(Site(*site), {})[test] = seconds
    return found


def remove(site: Site, tests: dict[str, float]) -> Verdict:
    """Runs the tests that reach a site without it, the quickest first, until one sees it."""
    for test, seconds in sorted(tests.items(), key=lambda item: item[1]):
        limit = max(_LEAST_SECONDS, 4 * seconds)
        code, output = _pytest([test], {_REMOVE: json.dumps(site)}, timeout=limit)
        if code != pytest.ExitCode.OK:
            return Verdict(site, _how(code, output), test)
    return Verdict(site, None, None)


def _how(code: int | None, output: str) -> str:
    """The kind of failure, from pytest's exit code (None: it was stopped) and output."""
    if code is None:
        return "hang"
    if code != pytest.ExitCode.TESTS_FAILED:
        raise RuntimeError(f"pytest ended with {code}, which is no failed test:\n{output[-4000:]}")
    kind, message = re.findall(r"^E +(\w+(?:Error|Exception)): *(.*)", output, re.MULTILINE)[-1]
    if kind != "AssertionError":
        return f"{kind}: {message[:90]}"
    # `run` compares the places of the races that the detector printed with those that are known.
    return "race" if message.startswith("assert {") else "wrong result"


def _pytest(
    tests: list[str], environment: dict[str, str], timeout: float
) -> tuple[int | None, str]:
    """Exit code and output; None where it had to be stopped."""
    plugins = ["-p", "tests.barrier_mutations", "-p", "no:cacheprovider"]
    command = [sys.executable, "-m", "pytest", "-x", "-q", "--tb=short", *plugins, *tests]
    limits = {"NPROC": "16", "JAX_PLATFORMS": "cpu", "PYTHONPATH": str(ROOT)}
    try:
        done = subprocess.run(
            command,
            cwd=ROOT,
            env=os.environ | limits | environment,
            capture_output=True,
            text=True,
            timeout=timeout,
            check=False,
        )
    except subprocess.TimeoutExpired:
        return None, ""
    return done.returncode, done.stdout + done.stderr


def verdicts(sites: dict[Site, dict[str, float]], only: Iterable[Site] = ()) -> Iterator[Verdict]:
    """Removes each site, or each of `only`, in the order of the source."""
    chosen = set(only) or set(sites)
    for site in sorted(chosen, key=lambda site: (site.module, site.line, site.operation)):
        yield remove(site, sites[site])


class _Plugin:
    """Stands in for the synchronization of `plgpu` and notes who calls it."""

    def __init__(self, removed: Site | None, path: str | None) -> None:
        self.removed, self.path = removed, path
        self.reached: set[Site] = set()
        self.tests: dict[str, tuple[float, list[Site]]] = {}
        for name in SYNCHRONIZATION:
            if hasattr(plgpu, name):
                setattr(plgpu, name, self._stand_in(name, getattr(plgpu, name)))

    def _stand_in(self, name: str, original: Any) -> Any:
        @functools.wraps(original)
        def call(*args: Any, **kwargs: Any) -> Any:
            caller = sys._getframe(1)
            module, function = caller.f_globals["__name__"], caller.f_code.co_qualname
            site = Site(name, module, function, caller.f_lineno)
            self.reached.add(site)
            return None if site == self.removed else original(*args, **kwargs)

        return call

    @pytest.hookimpl(wrapper=True)
    def pytest_runtest_call(self, item: pytest.Item) -> Any:
        self.reached.clear()
        started = time.monotonic()
        try:
            return (yield)
        finally:
            self.tests[item.nodeid] = (time.monotonic() - started, sorted(self.reached))

    def pytest_collection_modifyitems(self, items: list[pytest.Item]) -> None:
        if os.environ.get(_FIRST_ONLY):
            first = {item.nodeid.partition("[")[0]: item for item in reversed(items)}
            items[:] = [item for item in items if item in first.values()]

    def pytest_sessionfinish(self) -> None:
        if self.path:
            pathlib.Path(self.path).write_text(json.dumps(self.tests))


def pytest_configure(config: pytest.Config) -> None:
    """Makes this module a pytest plugin."""
    removed = os.environ.get(_REMOVE)
    site = Site(*json.loads(removed)) if removed else None
    config.pluginmanager.register(_Plugin(site, os.environ.get(_RECORD)))


def main(argv: Sequence[str] | None = None) -> int:
    """Prints a line for each removal; exit code 1 if one is neither seen nor explained."""
    parser = argparse.ArgumentParser(prog="python -m tests.barrier_mutations")
    parser.description = "Runs the kernels' tests without one barrier at a time; takes minutes."
    parser.parse_args(argv)
    found = []
    for verdict in verdicts(record()):
        print(verdict, flush=True)
        found.append(verdict)
    return 1 if any(one.how is None and one.excuse is None for one in found) else 0


if __name__ == "__main__":
    interruption.exit_with(main)
