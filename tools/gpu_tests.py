"""Runs `pytest -m gpu` and writes what ran, on what, and how it went to `summary.json`.

    python -m tools.gpu_tests RESULTS_FOLDER [pytest arguments]
    python -m tools.gpu_tests RESULTS_FOLDER --only timing [...]     # or: --only parallel
    python -m tools.gpu_tests RESULTS_FOLDER --resume [...]          # what has not passed yet

`progress.jsonl` in the folder gets a line per test as it ends. So a run that was cut off goes on
with `--resume`, at the same commit (`GIT_COMMIT` names it in a copy without history).

Where `CUDA_VISIBLE_DEVICES` names several GPUs, each test process takes one of them.

`junit.xml` and, for those that measure time and so run alone, `junit_timing.xml` in the same folder
hold the single tests.
"""

from __future__ import annotations

import argparse
import datetime
import json
import os
import pathlib
import subprocess
import sys
import xml.etree.ElementTree as ElementTree
from typing import Any

from bench import commands, environment
from jax_moe.io.files import write_atomically
from pallas_kernels import interruption

ROOT = pathlib.Path(__file__).parent.parent
MOST_WORKERS = 12
NEEDED = {"pytest": "pytest", "xdist": "pytest-xdist"}
PARTS = ("parallel", "timing")
NOTHING_SELECTED = 5  # pytest's exit code


def outcome(junit: pathlib.Path) -> dict[str, Any]:
    """Counts, seconds and the names of what failed, from one of pytest's JUnit files."""
    suite = ElementTree.parse(junit).getroot().find("testsuite")
    if suite is None:
        raise ValueError(f"{junit}: expected a testsuite element, got none")
    failed = [
        f"{case.get('classname')}::{case.get('name')}"
        for case in suite.iter("testcase")
        if case.find("failure") is not None or case.find("error") is not None
    ]
    counts = {name: int(suite.get(name, 0)) for name in ("tests", "failures", "errors", "skipped")}
    return {**counts, "seconds": float(suite.get("time", 0)), "failed": failed}


def begin(progress: pathlib.Path, *, resume: bool) -> list[str]:
    """Begins the file of outcomes, or goes on with it.

    Args:
        progress: The file.
        resume: Whether to go on.

    Returns:
        The tests that passed before.

    Raises:
        ValueError: There is nothing to go on with, or it is another commit's.
    """
    commit = environment.git_commit()
    if not resume:
        progress.parent.mkdir(parents=True, exist_ok=True)
        progress.write_text(json.dumps({"commit": commit}) + "\n")
        return []
    if not progress.exists():
        raise ValueError(f"--resume: expected {progress}, which a run before this one writes")
    before = json.loads(progress.read_text().partition("\n")[0])["commit"]
    if before != commit:
        raise ValueError(f"--resume: expected a run of commit {commit}, got one of {before}")
    from tools import gpu_progress  # which needs pytest

    return gpu_progress.passed(progress)


def run_pytest(markers: str, junit: pathlib.Path, options: list[str]) -> int:
    """Runs one selection of the tests; the exit code is pytest's, 0 where nothing was selected."""
    # pytest-benchmark, where it is installed, warns under xdist, and warnings are errors here.
    fixed = [
        "-m",
        markers,
        "-p",
        "no:benchmark",
        f"--junitxml={junit}",
        "-o",
        "junit_family=xunit1",
    ]
    command = [sys.executable, "-m", "pytest", *fixed, *options]
    code = subprocess.run(command, cwd=ROOT, check=False).returncode
    return 0 if code == NOTHING_SELECTED else code


def workers() -> int:
    """Test processes: for 3 of 4 cores, at most `MOST_WORKERS` per GPU that is named."""
    gpus = os.environ.get("CUDA_VISIBLE_DEVICES", "").count(",") + 1
    return max(1, min(MOST_WORKERS * gpus, (os.cpu_count() or 1) * 3 // 4))


def main(argv: list[str]) -> int:
    """Command line; the exit code is pytest's, or 2 where no GPU test ran."""
    if argv[:1] in (["-h"], ["--help"]):
        print((__doc__ or "").strip())
        return 0
    if not argv or argv[0].startswith("-"):
        print("usage: python -m tools.gpu_tests RESULTS_FOLDER [pytest arguments]", file=sys.stderr)
        return 2
    part, options = "", argv[1:]
    if resume := "--resume" in options:
        options.remove("--resume")
    if options[:1] == ["--only"]:
        part, options = "".join(options[1:2]), options[2:]
        if part not in PARTS:
            print(f"--only: expected one of {', '.join(PARTS)}, got {part!r}", file=sys.stderr)
            return 2
    try:
        folder = commands.usable(argv[0]).absolute()
    except argparse.ArgumentTypeError as error:
        print(f"RESULTS_FOLDER: {error}", file=sys.stderr)
        return 2
    if lacking := environment.lacking_packages(NEEDED):
        packages = " ".join(lacking)
        print(
            f"python -m tools.gpu_tests: needs {packages}: pip install {packages}", file=sys.stderr
        )
        return 2
    progress, leave_out = folder / "progress.jsonl", folder / "passed_before.txt"
    try:
        before = begin(progress, resume=resume)
    except ValueError as error:
        print(error, file=sys.stderr)
        return 2
    leave_out.write_text("".join(f"{test}\n" for test in before))
    options += ["-p", "tools.gpu_progress", f"--progress={progress}", f"--leave-out={leave_out}"]
    parallel, alone = folder / "junit.xml", folder / "junit_timing.xml"
    for junit in (parallel, alone):
        junit.unlink(missing_ok=True)
    started = datetime.datetime.now(datetime.UTC).isoformat(timespec="seconds")
    spread = ["-n", str(workers()), "--dist", "loadgroup"]  # compiling dominates
    codes = []
    if part != "timing":
        codes.append(run_pytest("gpu and not timing", parallel, [*spread, *options]))
    if part != "parallel":
        codes.append(run_pytest("gpu and timing", alone, options))
    exit_code = next((code for code in codes if code), 0)
    outcomes = [outcome(junit) for junit in (parallel, alone) if junit.exists()]
    if not outcomes:
        return exit_code
    environment.prepare_process()  # JAX starts here, after the tests have left the GPU
    summary = {
        "started": started,
        "part": part or "all",
        "passed_before": len(before),
        "exit_code": exit_code,
        **{key: sum((one[key] for one in outcomes[1:]), outcomes[0][key]) for key in outcomes[0]},
        "device": environment.device(),
        "gpu": environment.gpu_state(),
        "versions": environment.versions(),
        "commit": environment.git_commit(),
    }
    with write_atomically(folder / "summary.json") as file:
        json.dump(summary, file, indent=2)
    if summary["tests"] == summary["skipped"] and not before:
        kind = environment.device()["kind"]
        print(f"no GPU test ran; JAX's device here is {kind!r}", file=sys.stderr)
        return 2
    bad = summary["failures"] + summary["errors"]
    print(
        f"{folder / 'summary.json'}: {summary['tests']} tests, {bad} failed; "
        f"{len(before)} had passed before"
    )
    return exit_code


if __name__ == "__main__":
    interruption.exit_with(lambda: main(sys.argv[1:]))
