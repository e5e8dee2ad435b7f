"""compute-sanitizer on every GPU kernel: memory errors, races, uninitialized reads, barriers.

    python -m tests.sanitize RESULTS_FOLDER [--tools memcheck,racecheck] [--backends mosaic]

Each tool runs `tests.sanitizer_target` on each backend in a process with a time limit; initcheck
runs `tests.sanitizer_control` before, which shows what stores this version of it sees. The folder
gets a log of each run, `sanitize.json` and `sanitize.md`. What ran before there, at the same commit
on the same kind of GPU, is kept, so the tools may run one by one. Exit code 1 where a report is not
explained, 2 where nothing could run.
"""

from __future__ import annotations

import argparse
import collections
import contextlib
import json
import os
import pathlib
import re
import shutil
import subprocess
import sys
import time
from collections.abc import Sequence
from typing import Any, NotRequired, TypedDict

from bench import environment, typed
from bench.commands import usable
from interop import folder_lock
from interop.arguments import positive_finite
from jax_moe.io.files import kept_if_used, shown, write_atomically
from pallas_kernels import interruption
from tests.cuda_tools import wheel_bin
from tests.sanitizer_control import READERS

ROOT = pathlib.Path(__file__).parent.parent
TOOLS = {
    # XLA probes the driver with calls that may fail. Bulk copies and wgmma are checked by default.
    "memcheck": ("--report-api-errors", "no"),
    "racecheck": ("--racecheck-report", "analysis"),
    # All reports, so that an expected one cannot hide another.
    "initcheck": ("--print-limit", "1000000", "--show-backtrace", "no"),
    "synccheck": (),
}
TENSOR_OPS = "--check-tensor-ops"
"""Checks of TMA copies of tensors, which only newer versions of the tool know."""
BACKENDS = ("mosaic", "triton")
CONTROL = "control"
COPIED = "control, copied to the host"
_UNSEEN = (
    "the control: its buffer was written whole by such stores, and came out right, so this version "
    "of the tool does not see them"
)
EXPLAINED = {
    ("initcheck", READERS["tma_stores"]): _UNSEEN,
    ("initcheck", READERS["tma_tiles"]): _UNSEEN,
    ("initcheck", COPIED): "the control compares its buffers, these stores' too, on the host",
}
"""(tool, kernel) whose reports are expected, and why."""
READS_TILES = ("mosaic", "moe_unpermute")
LEFT_OUT = (
    f"`{READS_TILES[1]}` was left out: it reads what moe_down_projection stored as `tma_tiles`, "
    "which this version of the tool does not see (the control shows it); that all of it is written "
    "is shown otherwise (test_the_poison_reaches_new_buffers)"
)
"""Why initcheck skips a kernel where the control's reader of such tiles is reported, too."""

# One cudaMalloc an array, so that its bounds are seen; launches apart from each other.
ENVIRONMENT = {
    "XLA_PYTHON_CLIENT_PREALLOCATE": "false",
    "XLA_PYTHON_CLIENT_ALLOCATOR": "platform",
    "XLA_FLAGS": "--xla_gpu_enable_command_buffer=",
    "JAX_ENABLE_COMPILATION_CACHE": "false",
}

_SUMMARY = re.compile(
    r"ERROR SUMMARY: (\d+) errors?|RACECHECK SUMMARY: (\d+) hazards? displayed \((\d+) err"
)
_KERNEL = re.compile(r"\b(?:((?:moe|control)_[a-z_]+)_mosaic_gpu_kernel|([a-z_]+_kernel))\b")
# A first line beside the margin, then indented ones.
_REPORT = re.compile(
    r"^========= (?! |COMPUTE-SANITIZER|.*SUMMARY)(?=.*(?:Err|err|Warn|Invalid|Uninit|Race|hit)).*"
    r"(?:\n=========  .*)*",
    re.MULTILINE,
)
_HOST_COPY, _OF_CONTROL = "on access by cudaMemcpy source", '"backend": "control"'
_MOST_LOG = 200_000  # characters of a log that are kept, from its end


def find_sanitizer() -> str | None:
    """The tool on PATH, of a CUDA toolkit, or of the wheel nvidia-cuda-sanitizer-api."""
    on_path = shutil.which(
        "compute-sanitizer", path=f"{os.environ.get('PATH', '')}:/usr/local/cuda/bin"
    )
    if on_path:
        return on_path
    try:
        return str(wheel_bin("compute-sanitizer") / "compute-sanitizer")
    except FileNotFoundError:
        return None


def knows(sanitizer: str, option: str) -> bool:
    """Whether this version of the tool has an option."""
    shown = subprocess.run([sanitizer, "--help"], capture_output=True, text=True, check=False)
    return option in shown.stdout + shown.stderr


def is_blind_to_tiles(runs: list[dict[str, Any]]) -> bool:
    """Whether the control among these runs showed that initcheck misses stores of tiles by TMA."""
    return any(r["backend"] == CONTROL and READERS["tma_tiles"] in r["reports"] for r in runs)


def reports_of(log: str) -> dict[str, int]:
    """Reports by kernel; "" for those that name none."""
    found: collections.Counter[str] = collections.Counter()
    for report in _REPORT.findall(log):
        if _HOST_COPY in report and _OF_CONTROL in log:
            found[COPIED] += 1
            continue
        kernel = _KERNEL.search(report)
        found[(kernel[1] or kernel[2]) if kernel else ""] += 1
    return dict(found)


def verdict(tool: str, log: str, code: int | None) -> dict[str, Any]:
    """What one run says: its state and the reports by kernel.

    Args:
        tool: Which one.
        log: What it wrote.
        code: Its exit code, None where it ran out of time.

    Returns:
        `state`: "clean", "explained", "errors", "timeout", or "failed" where the tool or the
        program under it did not get to the end.
    """
    summary = _SUMMARY.search(log)
    reports = reports_of(log)
    count = int(summary[1] or summary[2]) if summary else None
    if code is None:
        state = "timeout"
    elif summary is None or '"relative_errors"' not in log:
        state = "failed"
    elif count == 0 and not reports:
        state = "clean" if code == 0 else "failed"
    elif reports and all((tool, kernel) in EXPLAINED for kernel in reports):
        state = "explained"
    else:
        state = "errors"
    return {"state": state, "errors": count, "reports": reports, "exit_code": code}


def run(
    sanitizer: str, tool: str, backend: str, timeout: float, earlier: list[dict[str, Any]]
) -> tuple[dict[str, Any], str]:
    """Runs one tool on one backend; the verdict and the log, the program's output included."""
    command = [sanitizer, "--tool", tool, "--target-processes", "application-only"]
    command += ["--launch-timeout", "120", *TOOLS[tool]]
    if tool in ("memcheck", "initcheck") and knows(sanitizer, TENSOR_OPS):
        command += [TENSOR_OPS, "yes"]
    left_out = tool == "initcheck" and backend == READS_TILES[0] and is_blind_to_tiles(earlier)
    if left_out:
        command += ["--kernel-name-exclude", f"kernel_substring={READS_TILES[1]}"]
    module = "tests.sanitizer_control" if backend == CONTROL else "tests.sanitizer_target"
    command += [sys.executable, "-m", module, backend]
    before = time.monotonic()
    process = subprocess.Popen(
        command,
        cwd=ROOT,
        env={**os.environ, **ENVIRONMENT},
        stdout=subprocess.PIPE,
        stderr=subprocess.STDOUT,
        text=True,
        errors="replace",
        start_new_session=True,  # so that its children end with it
    )
    try:
        log, _ = process.communicate(timeout=timeout)
        code: int | None = process.returncode
    except subprocess.TimeoutExpired:
        os.killpg(process.pid, 9)
        log, _ = process.communicate()
        code = None
    except BaseException:  # a signal: in a session of its own, it would run on
        if process.poll() is None:
            os.killpg(process.pid, 9)
            process.wait()
        raise
    found = verdict(tool, log, code) | ({"left_out": LEFT_OUT} if left_out else {})
    seconds = round(time.monotonic() - before, 1)
    return {"tool": tool, "backend": backend, **found, "seconds": seconds}, log


def table(summary: dict[str, Any]) -> str:
    """The summary in Markdown."""
    lines = [
        "# compute-sanitizer",
        "",
        f"{summary['device']['kind']}, commit {summary['commit']}, {summary['sanitizer']}.",
        "",
        "| tool | backend | state | reports by kernel | seconds |",
        "|---|---|---|---|--:|",
    ]
    for one in summary["runs"]:
        reports = ", ".join(f"{k or '(no kernel)'}: {n}" for k, n in one["reports"].items())
        cells = (one["tool"], one["backend"], one["state"], reports or "none", one["seconds"])
        lines.append("| " + " | ".join(map(str, cells)) + " |")
    met = {(one["tool"], kernel) for one in summary["runs"] for kernel in one["reports"]}
    notes = [f"{one[0]}, `{one[1]}`: {EXPLAINED[one]}" for one in sorted(met & EXPLAINED.keys())]
    notes += [
        f"{r['tool']} on {r['backend']}: {r['left_out']}"
        for r in summary["runs"]
        if "left_out" in r
    ]
    lines += ["", *[f"- {note}." for note in notes]]
    return "\n".join(lines).rstrip() + "\n"


class Run(TypedDict):
    """One tool on one backend, as far as the table shows it."""

    tool: str
    backend: str
    state: str
    reports: dict[str, int]
    seconds: float
    left_out: NotRequired[str]


def earlier_runs(
    path: pathlib.Path, about: dict[str, Any], *, overwrite: bool
) -> list[dict[str, Any]]:
    """The runs of an earlier summary that are gone on with.

    Args:
        path: Of the summary, if there is one.
        about: Of this run.
        overwrite: Replace one of another commit, kind of device or version.

    Raises:
        ValueError: It is another's, or damaged, and was not asked to be replaced.
    """
    if not path.exists():
        return []
    try:
        content = json.loads(path.read_text())
        runs: list[dict[str, Any]] = content["runs"]
        typed.check(runs, list[Run], "runs")
        others = [key for key in ("commit", "device", "versions") if content[key] != about[key]]
    except (OSError, KeyError, TypeError, ValueError):
        runs, others = [], ["file"]
    if not others:
        return runs
    if overwrite:
        return []
    raise ValueError(
        f"{shown(path)}: is of another {' and '.join(others)}; --overwrite replaces it, and runs "
        "of the same commit and GPU go on with theirs"
    )


def main(argv: list[str] | None = None) -> int:
    """Command line."""
    parser = argparse.ArgumentParser(prog="python -m tests.sanitize")
    parser.add_argument("results", type=usable, help="folder of sanitize.json and the logs")
    parser.add_argument("--tools", default=",".join(TOOLS))
    parser.add_argument("--backends", default=",".join(BACKENDS))
    parser.add_argument(
        "--timeout", type=positive_finite, default=540.0, help="seconds a run may take"
    )
    parser.add_argument("--sanitizer", type=os.path.expanduser, help="path of compute-sanitizer")
    parser.add_argument(
        "--overwrite", action="store_true", help="replace a summary of another commit or GPU"
    )
    args = parser.parse_args(argv)
    tools, backends = args.tools.split(","), args.backends.split(",")
    for name, chosen, known in (("tools", tools, TOOLS), ("backends", backends, BACKENDS)):
        if unknown := set(chosen) - set(known):
            parser.error(f"--{name}: expected some of {', '.join(known)}; got {sorted(unknown)}")
    sanitizer = find_sanitizer() if args.sanitizer is None else shutil.which(args.sanitizer)
    if sanitizer is None and args.sanitizer is not None:
        parser.error(f"--sanitizer: expected a program, got {args.sanitizer!r}")
    if sanitizer is None:
        print(
            "compute-sanitizer not found: it comes with the CUDA toolkit, and with "
            "`pip install nvidia-cuda-sanitizer-api`",
            file=sys.stderr,
        )
        return 2
    sanitizer = os.path.abspath(sanitizer)  # it is called in another folder
    try:
        about = _about(sanitizer)
    except OSError as error:  # executable, and no program
        parser.error(f"--sanitizer: {error}")
    if about["device"]["platform"] != "gpu":
        print(f"no GPU; JAX's device here is {about['device']['kind']!r}", file=sys.stderr)
        return 2
    runs = [(backend, tool) for backend in backends for tool in tools]
    if "initcheck" in tools:
        runs.insert(0, (CONTROL, "initcheck"))
    path = args.results / "sanitize.json"
    with contextlib.ExitStack() as stack:
        try:
            stack.enter_context(kept_if_used(args.results))
            stack.enter_context(folder_lock.held(args.results))
            earlier = earlier_runs(path, about, overwrite=args.overwrite)
        except ValueError as error:
            parser.error(str(error))
        return run_all(runs, sanitizer, args.timeout, {**about, "runs": earlier}, path)


def run_all(
    runs: Sequence[tuple[str, str]],
    sanitizer: str,
    timeout: float,
    summary: dict[str, Any],
    path: pathlib.Path,
) -> int:
    """Makes the runs and writes the summary after each.

    Args:
        runs: Backend and tool of each.
        sanitizer: The program.
        timeout: Of a run, in seconds.
        summary: With the `runs` that are there; theirs are replaced or added.
        path: Of the summary; the logs go beside it.

    Returns:
        1 if a run is not clean or explained, else 0.
    """
    for backend, tool in runs:
        print(f"{tool} on {backend} ...", end=" ", flush=True)
        found, log = run(sanitizer, tool, backend, timeout, summary["runs"])
        print(f"{found['state']} {found['reports'] or ''} ({found['seconds']} s)", flush=True)
        path.with_name(f"{tool}_{backend}.log").write_text(log[-_MOST_LOG:])
        kept = [r for r in summary["runs"] if (r["tool"], r["backend"]) != (tool, backend)]
        summary["runs"] = sorted([*kept, found], key=lambda r: (r["backend"], r["tool"]))
        _write(path.parent, summary)
    good = all(one["state"] in ("clean", "explained") for one in summary["runs"])
    return 0 if good else 1


def _about(sanitizer: str) -> dict[str, Any]:
    """Of the surroundings, taken in a process of its own: this one leaves the GPU alone."""
    code = (
        "import json; from bench import environment as e; e.prepare_process();"
        "print(json.dumps({'device': dict(e.device()), 'versions': e.versions(),"
        "'commit': e.git_commit(), 'gpu': e.gpu_state()}))"
    )
    version = subprocess.run([sanitizer, "--version"], capture_output=True, text=True, check=False)
    done = subprocess.run(
        [sys.executable, "-c", code], cwd=ROOT, capture_output=True, text=True, check=True
    )
    found = re.search(r"Version .*", version.stdout)
    about = json.loads(done.stdout.splitlines()[-1])
    return {**about, "sanitizer": f"compute-sanitizer {found[0] if found else 'unknown'}"}


def _write(folder: pathlib.Path, summary: dict[str, Any]) -> None:
    with write_atomically(folder / "sanitize.json") as file:
        json.dump(summary, file, indent=2)
        file.write("\n")
    with write_atomically(folder / "sanitize.md") as file:
        file.write(table(summary))


if __name__ == "__main__":
    environment.prepare_process()
    interruption.exit_with(main)
