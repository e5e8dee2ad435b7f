"""Runs `pytest -m gpu` and writes what ran, on what, and how it went to `summary.json`.

    python -m tools.gpu_tests RESULTS_FOLDER [pytest arguments]
    python -m tools.gpu_tests RESULTS_FOLDER --only timing [...]     # or: --only parallel
    python -m tools.gpu_tests RESULTS_FOLDER --resume [...]          # what has not passed yet
    python -m tools.gpu_tests RESULTS_FOLDER --overwrite [...]       # replaces an earlier run

`progress.jsonl` in the folder gets a line per test as it ends. So a run that was cut off goes on
with `--resume`, at the same commit (`GIT_COMMIT` names it in a copy without history).

Where `CUDA_VISIBLE_DEVICES` names several GPUs, each test process takes one of them.

`junit.xml` and, for those that measure time and so run alone, `junit_timing.xml` in the same folder
hold the single tests.
"""

from __future__ import annotations

import argparse
import contextlib
import datetime
import json
import os
import pathlib
import subprocess
import sys
import xml.etree.ElementTree as ElementTree
from typing import Any, NamedTuple

from bench import commands, environment, run_folder
from bench.failures import FileError, writing
from interop import folder_lock
from jax_moe.io.files import kept_if_used, shown, write_atomically
from pallas_kernels import interruption

ROOT = pathlib.Path(__file__).parent.parent
MOST_WORKERS = 12
NEEDED = {"pytest": "pytest", "xdist": "pytest-xdist"}
PARTS = ("parallel", "timing")
FILES = ("summary.json", "progress.jsonl", "passed_before.txt", "junit.xml", "junit_timing.xml")
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
        FileError: It cannot be written.
        ValueError: There is nothing to go on with, it is damaged, or another commit's.
    """
    commit = environment.git_commit()
    if not resume:
        with writing(progress), write_atomically(progress) as file:
            file.write(json.dumps({"commit": commit}) + "\n")
        return []
    if not progress.exists():
        raise ValueError(f"--resume: expected {progress}, which a run before this one writes")
    try:
        before = json.loads(progress.read_text().partition("\n")[0])["commit"]
    except (KeyError, TypeError, ValueError):
        raise ValueError(f"--resume: {shown(progress)}: damaged: expected a commit first") from None
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
    try:
        chosen, options = read_options(argv[1:])
        folder = commands.usable(argv[0]).absolute()
    except (argparse.ArgumentTypeError, ValueError) as error:
        where = "RESULTS_FOLDER: " if isinstance(error, argparse.ArgumentTypeError) else ""
        print(f"{where}{error}", file=sys.stderr)
        return 2
    if lacking := environment.lacking_packages(NEEDED):
        packages = " ".join(lacking)
        print(
            f"python -m tools.gpu_tests: needs {packages}: pip install {packages}", file=sys.stderr
        )
        return 2
    with contextlib.ExitStack() as stack:
        stack.enter_context(kept_if_used(folder))
        try:
            stack.enter_context(folder_lock.held(folder))
            refuse_earlier(folder, chosen)
            before = begin(folder / "progress.jsonl", resume=chosen.resume)
        except ValueError as error:
            print(error, file=sys.stderr)
            return 2
        except FileError as error:
            print(error, file=sys.stderr)
            return 1
        try:
            return run(folder, chosen.part, before, options)
        except FileError as error:
            print(error, file=sys.stderr)
            return 1


class Chosen(NamedTuple):
    """What is run, and what of an earlier run is kept.

    Attributes:
        part: One of `PARTS`, or "" for both.
        resume: Whether to go on with the run in the folder.
        overwrite: Whether to replace it.
    """

    part: str
    resume: bool
    overwrite: bool


def read_options(options: list[str]) -> tuple[Chosen, list[str]]:
    """Those of this command, and the others, which are pytest's.

    Raises:
        ValueError: One is unknown, or two contradict each other.
    """
    rest, part = list(options), ""
    flags = {name: name in rest for name in ("--resume", "--overwrite")}
    if all(flags.values()):
        raise ValueError("--resume and --overwrite contradict each other")
    rest = [one for one in rest if one not in flags]
    if "--only" in rest:
        place = rest.index("--only")
        part = "".join(rest[place + 1 : place + 2])
        del rest[place : place + 2]
        if part not in PARTS:
            raise ValueError(f"--only: expected one of {', '.join(PARTS)}, got {part!r}")
    return Chosen(part, *flags.values()), rest


def refuse_earlier(folder: pathlib.Path, chosen: Chosen) -> None:
    """Raises `ValueError` if a folder holds results that nobody asked to replace."""
    run_folder.refuse_others(folder, FILES, "RESULTS_FOLDER")
    earlier = run_folder.files_of_a_run(folder, FILES)
    if earlier and not (chosen.resume or chosen.overwrite):
        raise ValueError(
            f"RESULTS_FOLDER: {shown(folder)} holds {', '.join(earlier)} of an earlier run; "
            "--resume goes on with it, --overwrite replaces it"
        )


def run(folder: pathlib.Path, part: str, before: list[str], options: list[str]) -> int:
    """Runs the tests and writes what came of them; the exit code.

    Args:
        folder: Of the results.
        part: One of `PARTS`, or "" for both.
        before: Tests that passed before, and are left out.
        options: Of pytest.
    """
    progress, leave_out = folder / "progress.jsonl", folder / "passed_before.txt"
    with writing(leave_out):
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
    with writing(folder / "summary.json"), write_atomically(folder / "summary.json") as file:
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
