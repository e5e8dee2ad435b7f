"""One run of the benchmark, from settings to exit code."""

import shlex
import sys
import traceback
from collections.abc import Collection, Mapping, Sequence
from pathlib import Path
from typing import Any

import tqdm

from bench import (
    ahead,
    documents,
    environment,
    header,
    interpreter,
    run_folder,
    runner,
    saved,
    solutions,
    tracing,
)
from bench.failures import FileError
from bench.gpu_clock import ClockError
from bench.results import REFERENCE, Results, Row, load_rows
from bench.settings import Settings
from bench.workloads import LOCAL_EXPERTS, SCALING, WORKLOADS, select
from interop import dataset, folder_lock
from interop.solutions.base import Solution
from interop.workloads import Workload
from jax_moe import models
from jax_moe.io.files import shown
from pallas_kernels import interruption

OK, FAILED = 0, 1


def list_solutions(backend: str, model: str, **options: Any) -> str:
    """Every solution: what it is, whether it can run here and why not; as for `registry`."""
    lines = []
    found = solutions.registry(backend, models.get(model), **options)
    width = max(map(len, found))
    for name, solution in found.items():
        reason = solution.unavailable_reason()
        state = "available" if reason is None else f"not available: {reason}"
        lines.append(f"{name:{width}} {state}")
        lines.append(f"{'':{width}} {solution.description} [{solution.framework}]")
        if solution.caveat:
            lines.append(f"{'':{width}} note: {solution.caveat}")
    return "\n".join(lines)


def execute(
    settings: Settings,
    options: documents.Options,
    *,
    resume: bool = False,
    overwrite: bool = False,
    profile: Path | None = None,
    jobs: int = 0,
) -> int:
    """Runs the benchmark and writes its files.

    Args:
        settings: What to measure.
        options: What to write besides the results.
        resume: Keep what was measured of the results file in the output folder.
        overwrite: Replace the run in the output folder, from the first finished row on.
        profile: Folder for a trace of each row; None records none.
        jobs: Processes that compile JAX programs before the first row; 0 compiles row by row.

    Returns:
        The exit code: 0; 1 if a row is wrong or failed, or a file cannot be written; 130 after
        Ctrl-C and 143 after SIGTERM.

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
    if options.report and set(chosen) <= {REFERENCE, interpreter.SOLUTION.name}:
        raise ValueError(f"--report: compares solutions with {REFERENCE}, got no other one")
    with run_folder.opened(
        settings.output, stem=settings.stem, resume=resume, overwrite=overwrite
    ) as folder:
        results = _new_results(settings, options, unavailable, folder, profile, jobs)
        if drawn := dataset.stand_ins(workloads):
            results.about["stand_ins"] = drawn
        if settings.inputs == "dataset":
            results.about["routing_sha256"] = dataset.digests(settings.dataset or "")
        if results.path.exists() and resume:
            options = _keep_finished(results, settings, options, chosen, workloads)
            results.about["command"] += " --resume"
        with tracing.held(profile, folder.path, resume=resume and results.path.exists()):
            if folder.note:
                print(folder.note)
            begin = documents.introduction(results, settings, len(workloads), list(chosen))
            print(begin, flush=True)
            code, problem = _measure(settings, chosen, workloads, results, profile, jobs)
            return _conclude(results, settings, options, code, problem)


def _conclude(
    results: Results, settings: Settings, options: documents.Options, code: int, problem: str
) -> int:
    """Shows the tables and writes the documents; returns the exit code."""
    if not results.rows:
        print("no rows were finished: nothing was written")
        return code
    failure = ""
    try:
        if results.is_written or results.about["complete"]:
            results.about["gpu_state_after"] = environment.gpu_state()
            failure = _last_write(results)
        # The tables are shown whatever becomes of the files.
        print(documents.conclusion(results, settings, options), flush=True)
        if results.is_written and not failure:
            for path in documents.write_all(results, settings, options):
                interruption.check()
                print(f"wrote {shown(path)}")
        elif not failure:
            state = "is as it was" if results.path.exists() else "is not there"
            print(f"nothing new was written: {results.path} {state}")
    except FileError as error:
        failure = f"{error}; once it can: {_documents_command(results)}"
    except KeyboardInterrupt:
        print(f"interrupted: {_without_documents(results)}", file=sys.stderr)
        return interruption.acknowledge()
    except (interruption.OutputError, BrokenPipeError):
        print(_without_documents(results), file=sys.stderr)
        raise
    if failure and failure != problem:  # a disk that was full while measuring often still is
        print(failure, file=sys.stderr)
    return code or FAILED if failure else code


def _last_write(results: Results) -> str:
    """Writes the results once more, with what is known at the end; returns what failed."""
    try:
        results.write()
    except FileError as error:
        return str(error)
    return ""


def _without_documents(results: Results) -> str:
    if not results.path.exists():
        return f"{results.path} is not there: nothing was written"
    if not results.is_written:
        return f"{results.path} is as it was: nothing new was written"
    command = _documents_command(results)
    return f"{results.path} is whole, its documents are not; {command} writes them"


def _documents_command(results: Results) -> str:
    return f"python bench_main.py --documents={shlex.quote(str(results.path.parent))}"


def write_documents(folder: Path, options: documents.Options) -> int:
    """Writes the documents of the run in a folder again, from its results alone.

    Args:
        folder: Of the run, or its results.
        options: What to write besides what the run was asked for.

    Returns:
        The exit code: 0, or 1 if a file cannot be written.

    Raises:
        ValueError: There is no run, its file is damaged, or another process writes there.
    """
    try:
        found = saved.read(folder)
        folder = found.results.path.parent
        if options.breakdown and found.results.timer != "gpu":
            raise ValueError(f"{shown(folder)}: its run took no kernel times for --breakdown")
        if options.report and found.results.solutions() == [REFERENCE]:
            raise ValueError(f"{shown(folder)}: --report needs rows of more than {REFERENCE}")
        with folder_lock.held(folder):
            there = run_folder.files_of_a_run(folder)
            names = (f"{run_folder.REPORT}.md", f"{found.settings.stem}_breakdown.md")
            kept = documents.Options(*(name in there for name in names))
            both = documents.Options(*map(max, options, found.options, kept))
            written = [found.results.path]
            for path in documents.write_all(found.results, found.settings, both):
                written.append(path)
                print(f"wrote {shown(path)}")
            for name in run_folder.files_of_a_run(folder):
                if folder / name not in written:  # an earlier version's, say a plot of one point
                    (folder / name).unlink()
            print("\n".join(documents.verdict(found.results)))
    except ValueError as error:
        raise ValueError(f"--documents: {error}") from None
    except FileError as error:
        print(error, file=sys.stderr)
        return FAILED
    except KeyboardInterrupt:
        print(f"interrupted: the results in {folder} are as they were", file=sys.stderr)
        return interruption.acknowledge()
    return OK


def _pool(settings: Settings) -> Sequence[Workload]:
    if settings.inputs != "dataset":
        return SCALING if settings.scaling else WORKLOADS
    try:
        found = dataset.read_workloads(settings.dataset or "")
    except ValueError as error:
        raise ValueError(f"--dataset: {error}") from None
    for one in found:
        if one.workload.local_expert_offset % LOCAL_EXPERTS:
            raise ValueError(
                f"--dataset: workload {one.workload.uuid}: local_expert_offset: expected a "
                f"multiple of {LOCAL_EXPERTS}, got {one.workload.local_expert_offset}"
            )
    return sorted((row.workload for row in found), key=lambda row: row.num_tokens)


def _choose(settings: Settings) -> tuple[dict[str, Solution], dict[str, str]]:
    """The solutions to run and why the others that were asked for cannot."""
    known = solutions.known_to(settings)
    asked = solutions.choose(settings.solutions, known)
    reference = {REFERENCE: known[REFERENCE]}
    reasons = {name: one.unavailable_reason() for name, one in (reference | asked).items()}
    unavailable = {name: why for name, why in reasons.items() if why is not None}
    chosen = {name: one for name, one in (reference | asked).items() if name not in unavailable}
    if not set(chosen) & set(asked):
        why = "; ".join(f"{name}: {reason}" for name, reason in unavailable.items())
        raise ValueError(f"--solutions: none of those asked for can run here: {why}")
    return chosen, unavailable


def _new_results(
    settings: Settings,
    options: documents.Options,
    unavailable: dict[str, str],
    folder: run_folder.RunFolder,
    profile: Path | None,
    jobs: int,
) -> Results:
    others: dict[str, Any] = options._asdict() | {
        "output": settings.output,
        "jobs": jobs or None,
        "profile": profile,
    }
    about = environment.about(settings.sizes) | {
        "complete": False,
        "command": settings.command(**others),
        "asked": {
            "solutions": settings.solutions,
            "workloads": settings.workloads,
            **options._asdict(),
        },
        "settings": settings.comparable(),
    }
    about["gpu_state_before"] = about.pop("gpu_state")
    path = folder.path / f"{settings.stem}.json"
    return Results(path, about, settings.timer, unavailable, begin=folder.begin)


def _keep_finished(
    results: Results,
    settings: Settings,
    options: documents.Options,
    chosen: Collection[str],
    workloads: Sequence[Workload],
) -> documents.Options:
    """Takes over rows and command of the run in the folder; returns what to write of both."""
    uuids = {workload.uuid for workload in workloads}
    surroundings = {name: results.about[name] for name in ("device", "versions", "git_commit")}
    kept = load_rows(
        results.path,
        results.about["settings"],
        surroundings,
        settings.passes,
        is_asked=lambda row: (
            row.solution in chosen
            and (row.uuid in uuids or row.solution == interpreter.SOLUTION.name)
        ),
    )
    results.rows = {(row.solution, row.uuid): row for row in kept}
    results.about["resumed_rows"] = results.rows_on_disk = len(kept)
    try:
        earlier = saved.read(results.path)
    except ValueError as error:
        raise ValueError(f"--resume: {error}") from None
    before = earlier.results.about.get("routing_sha256", {})  # older files have none
    for uuid, digest in results.about.get("routing_sha256", {}).items():
        if before.get(uuid, digest) != digest:
            raise ValueError(
                f"--resume: workload {uuid}: --dataset holds another routing than "
                f"{shown(results.path)} was measured with"
            )
    if drawn := earlier.results.about.get("stand_ins"):  # the same tensors by another name, too
        results.about.setdefault("stand_ins", drawn)
    results.about["resumed_commands"] = earlier.results.commands()
    results.roofline = earlier.results.roofline  # until this run has measured it
    for name, why in earlier.results.unavailable.items():
        if name not in chosen:
            results.unavailable.setdefault(name, why)
    both = documents.Options(*map(max, options, earlier.options))  # else its documents would go
    asked = earlier.results.about.get("asked", {})
    results.about["asked"] |= both._asdict() | {"uuids": asked.get("uuids", {})}
    return both


def _note_asked(results: Results, asked: Collection[tuple[str, str]]) -> None:
    """Adds (solution, uuid) to what the run and those that it goes on with were asked for.

    What of it has no row in the end is missing, whichever of them asked for it.
    """
    uuids = {name: set(them) for name, them in results.about["asked"].get("uuids", {}).items()}
    for name, uuid in asked:
        uuids.setdefault(name, set()).add(uuid)
    results.about["asked"] |= {
        "rows": sum(map(len, uuids.values())),
        "uuids": {name: sorted(them) for name, them in uuids.items()},
    }


def _measure(
    settings: Settings,
    chosen: Mapping[str, Solution],
    workloads: Sequence[Workload],
    results: Results,
    profile: Path | None,
    jobs: int,
) -> tuple[int, str]:
    """The exit code, and what stopped the measuring early; empty if nothing did."""
    timed = {name: one for name, one in chosen.items() if one is not interpreter.SOLUTION}
    asked = {(name, row.uuid) for name in timed for row in workloads}
    timed_already = [results.timed_by(clock) for clock in settings.passes]
    interpreted = set(chosen) - set(timed) - set(results.solutions())
    total = sum(len(asked - of_clock) for of_clock in timed_already) + len(interpreted)
    # Which workload the interpreter takes does not matter: it is one row.
    _note_asked(results, asked | {(name, "") for name in interpreted})
    orders = ahead.orders(timed, workloads, set.intersection(*timed_already)) if jobs else []
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
                if interpreted:
                    progress.start("the kernels in the interpreter")
                    row = interpreter.check(settings, workloads)
                    results.put(row)
                    progress.done(row)
        except KeyboardInterrupt:
            problem = "interrupted"
            if results.rows:
                problem += ": what was finished is kept; --resume goes on from there"
            bar.write(problem)
            results.about["stopped"] = "interrupted"
            return interruption.acknowledge(), problem
        except ClockError as error:
            problem = f"GPU timer: {error}; --timer=wall needs no profiler"
        except FileError as error:
            problem = str(error)
        except (interruption.OutputError, BrokenPipeError):  # of a row's line; all is on disk
            raise
        except ValueError as error:  # a data set that does not fit: one line for the user
            if not results.rows:
                raise
            problem = f"stopped: {error}; finished rows are kept"
        except Exception:
            bar.write(traceback.format_exc())
            problem = "stopped: the device failed outside of a solution"
            if results.rows:
                problem += "; finished rows are kept"
        else:
            results.about["complete"] = True
            if not header.is_complete(results):  # resumed with less than was asked for at first
                results.about |= {"complete": False, "stopped": header.stopped(results)}
            return (FAILED if results.failures() else OK), ""
        bar.write(problem, file=sys.stderr)
        results.about["stopped"] = problem
        return FAILED, problem
