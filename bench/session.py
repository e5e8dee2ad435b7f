"""One run of the benchmark, from settings to exit code."""

import datetime
import sys
import tempfile
import traceback
from collections.abc import Mapping, Sequence
from pathlib import Path

import tqdm

from bench import (
    ahead,
    documents,
    environment,
    interpreter,
    runner,
    solutions,
    tracing,
)
from bench.gpu_clock import ClockError
from bench.results import REFERENCE, Results, Row, load_rows
from bench.settings import Settings
from bench.workloads import SCALING, WORKLOADS, select
from interop import dataset, interruption
from interop.solutions.base import Solution
from interop.workloads import Workload
from jax_moe.io.files import naming

OK, FAILED, INTERRUPTED = 0, 1, 130


def list_solutions(backend: str) -> str:
    """Every solution: what it is, whether it can run here and why not."""
    lines = []
    for name, solution in solutions.registry(backend).items():
        reason = solution.unavailable_reason()
        lines.append(f"{name:18} {'available' if reason is None else f'not available: {reason}'}")
        lines.append(f"{'':18} {solution.description} [{solution.framework}]")
        if solution.caveat:
            lines.append(f"{'':18} note: {solution.caveat}")
    return "\n".join(lines)


def execute(
    settings: Settings,
    options: documents.Options,
    *,
    resume: bool,
    profile: Path | None,
    jobs: int = 0,
) -> int:
    """Runs the benchmark and writes its files.

    Args:
        settings: What to measure.
        options: What to write besides the results.
        resume: Keep the finished rows of the results file in the output folder.
        profile: Folder for a trace of each row; None records none.
        jobs: Processes that compile JAX programs before the first row; 0 compiles row by row.

    Returns:
        The exit code: 0; 1 if a row is wrong or failed; 130 if interrupted.

    Raises:
        ValueError: A setting names something unknown, unreadable or unwritable; one line.
    """
    if jobs and "wall" in settings.passes:
        raise ValueError(
            "--jobs: host times need programs compiled row by row; "
            "expected --timer=gpu and --nowall_time with it"
        )
    workloads = select(settings.workloads, _pool(settings))
    chosen, unavailable = _choose(settings)
    results = _new_results(settings, unavailable)
    if resume:
        _keep_finished(results, settings)
    _make_folder("--output", settings.output)
    if profile:
        _make_folder("--profile", profile)
    print(documents.introduction(results, settings, len(workloads), list(chosen)), flush=True)
    code = _measure(settings, chosen, workloads, results, profile, jobs)
    results.about["gpu_state_after"] = environment.gpu_state()
    results.write()
    print(documents.conclusion(results, settings, options))
    for path in documents.write_all(results, settings, options):
        print(f"wrote {path}")
    return code


def _make_folder(flag: str, folder: Path) -> None:
    """Makes a folder and writes to it, so that a run does not fail on it when it is measured."""
    try:
        with naming(folder):
            folder.mkdir(parents=True, exist_ok=True)
            tempfile.TemporaryFile(dir=folder).close()
    except ValueError as error:
        raise ValueError(f"{flag}: {error}") from None


def _pool(settings: Settings) -> Sequence[Workload]:
    if settings.inputs != "dataset":
        return SCALING if settings.scaling else WORKLOADS
    found = dataset.read_workloads(settings.dataset or "")
    return sorted((row.workload for row in found), key=lambda row: row.num_tokens)


def _choose(settings: Settings) -> tuple[dict[str, Solution], dict[str, str]]:
    """The solutions to run and why the others that were asked for cannot."""
    known = solutions.registry(settings.backend)
    asked = solutions.choose(settings.solutions, known)
    reference = {REFERENCE: known[REFERENCE]}
    reasons = {name: one.unavailable_reason() for name, one in (reference | asked).items()}
    unavailable = {name: why for name, why in reasons.items() if why is not None}
    chosen = {name: one for name, one in (reference | asked).items() if name not in unavailable}
    if not set(chosen) & set(asked):
        why = "; ".join(f"{name}: {reason}" for name, reason in unavailable.items())
        raise ValueError(f"--solutions: none of those asked for can run here: {why}")
    return chosen, unavailable


def _new_results(settings: Settings, unavailable: dict[str, str]) -> Results:
    about = {
        "started": datetime.datetime.now(datetime.UTC).isoformat(timespec="seconds"),
        "complete": False,
        "command": " ".join(sys.argv),
        "settings": settings.comparable(),
        "device": environment.device(),
        "versions": environment.versions(),
        "git_commit": environment.git_commit(),
        "gpu_state_before": environment.gpu_state(),
    }
    path = settings.output / f"{settings.stem}.json"
    return Results(path, about, settings.timer, unavailable)


def _keep_finished(results: Results, settings: Settings) -> None:
    surroundings = {name: results.about[name] for name in ("device", "versions", "git_commit")}
    kept = load_rows(results.path, results.about["settings"], surroundings, settings.passes)
    results.rows = {(row.solution, row.uuid): row for row in kept}
    results.about["resumed_rows"] = len(kept)


def _measure(
    settings: Settings,
    chosen: Mapping[str, Solution],
    workloads: Sequence[Workload],
    results: Results,
    profile: Path | None,
    jobs: int,
) -> int:
    timed = {name: one for name, one in chosen.items() if one is not interpreter.SOLUTION}
    finished = sum((name, row.uuid) in results.rows for name in timed for row in workloads)
    total = (len(timed) * len(workloads) - finished) * len(settings.passes)
    total += len(chosen) - len(timed)
    orders = ahead.orders(timed, workloads, set(results.rows)) if jobs else []
    total += len(orders)
    with tqdm.tqdm(total=total, unit="row", dynamic_ncols=True, file=sys.stderr) as bar:

        def step() -> None:
            bar.update()
            interruption.check()

        def done(row: Row) -> None:
            if row.problem:
                bar.write(f"{row.status}: {row.solution} at T={row.num_tokens}: {row.problem}")
            step()

        progress = runner.Progress(start=bar.set_postfix_str, done=done)
        trace = tracing.recorder(profile) if profile else None
        try:
            with interruption.undisguised():
                programs = None
                if orders:
                    progress.start("compiling")
                    programs = ahead.compile_all(settings, orders, jobs, step)
                runner.run(settings, timed, workloads, results, progress, trace, programs)
                if len(timed) < len(chosen):
                    progress.start("the kernels in the interpreter")
                    row = interpreter.check(settings)
                    results.put(row)
                    progress.done(row)
        except KeyboardInterrupt:
            bar.write("interrupted: what was finished is kept; --resume goes on from there")
            return INTERRUPTED
        except ClockError as error:
            bar.write(f"GPU timer: {error}; --timer=wall needs no profiler")
            return FAILED
        except ValueError:
            raise  # a data set that does not fit: one line for the user
        except Exception:
            bar.write(traceback.format_exc())
            bar.write("stopped: the device failed outside of a solution; finished rows are kept")
            return FAILED
    results.about["complete"] = True
    return FAILED if results.failures() else OK
