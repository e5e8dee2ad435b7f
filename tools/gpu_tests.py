"""Runs `pytest -m gpu` and writes what ran, on what, and how it went to `summary.json`.

    python -m tools.gpu_tests RESULTS_FOLDER [pytest arguments]

`junit.xml` in the same folder holds the single tests.
"""

from __future__ import annotations

import datetime
import json
import os
import pathlib
import subprocess
import sys
import xml.etree.ElementTree as ElementTree
from typing import Any

from bench import environment
from interop.files import write_atomically

ROOT = pathlib.Path(__file__).parent.parent
MOST_WORKERS = 8


def outcome(junit: pathlib.Path) -> dict[str, Any]:
    """Counts, seconds and the names of what failed, from pytest's JUnit file."""
    suite = ElementTree.parse(junit).getroot().find("testsuite")
    if suite is None:
        raise ValueError(f"{junit}: expected a testsuite element, found none")
    failed = [
        f"{case.get('classname')}::{case.get('name')}"
        for case in suite.iter("testcase")
        if case.find("failure") is not None or case.find("error") is not None
    ]
    counts = {name: int(suite.get(name, 0)) for name in ("tests", "failures", "errors", "skipped")}
    return {**counts, "seconds": float(suite.get("time", 0)), "failed": failed}


def workers() -> int:
    """Test processes that share the GPU: half of the cores, at most `MOST_WORKERS`."""
    return max(1, min(MOST_WORKERS, (os.cpu_count() or 1) // 2))


def main(argv: list[str]) -> int:
    """Command line; the exit code is pytest's, or 2 where no GPU test ran."""
    if not argv:
        print("usage: python -m tools.gpu_tests RESULTS_FOLDER [pytest arguments]", file=sys.stderr)
        return 2
    folder = pathlib.Path(argv[0]).absolute()
    folder.mkdir(parents=True, exist_ok=True)
    junit = folder / "junit.xml"
    junit.unlink(missing_ok=True)
    started = datetime.datetime.now(datetime.UTC).isoformat(timespec="seconds")
    parallel = ["-n", str(workers()), "--dist", "loadgroup"]  # compiling dominates
    # pytest-benchmark, where it is installed, warns under xdist, and warnings are errors here.
    options = ["-m", "gpu", "-p", "no:benchmark", f"--junitxml={junit}", *parallel, *argv[1:]]
    command = [sys.executable, "-m", "pytest", *options]
    exit_code = subprocess.run(command, cwd=ROOT, check=False).returncode
    if not junit.exists():
        return exit_code
    environment.prepare_process()  # JAX starts here, after the tests have left the GPU
    summary = {
        "started": started,
        "exit_code": exit_code,
        **outcome(junit),
        "device": environment.device(),
        "gpu": environment.gpu_state(),
        "versions": environment.versions(),
        "commit": environment.git_commit(),
    }
    with write_atomically(folder / "summary.json") as file:
        json.dump(summary, file, indent=2)
    if summary["tests"] == summary["skipped"]:
        kind = environment.device()["kind"]
        print(f"no GPU test ran; JAX's device here is {kind!r}", file=sys.stderr)
        return 2
    bad = summary["failures"] + summary["errors"]
    print(f"{folder / 'summary.json'}: {summary['tests']} tests, {bad} failed")
    return exit_code


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
