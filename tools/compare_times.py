"""Times the layer of several checkouts in one process, on the same inputs and by the same clock.

    python tools/compare_times.py ../before . --workloads 1,80,901

Each checkout lowers `jax_moe.apply` with its own modules, in processes of its own; the programs are
compiled here, so that all differ in nothing but their code. For each number of tokens they take
turns, as often as `--rounds` says: what one takes twice shows what a difference is worth. GPU spans
with a cold L2; on a CPU the programs are compared and times mean nothing.

Lowered layers are not kept meanwhile: what is kept knows its sources, not what else may differ.
"""

from __future__ import annotations

import argparse
import concurrent.futures as futures
import functools
import json
import os
import pathlib
import subprocess
import sys
import tempfile
from collections.abc import Callable, Sequence
from typing import Any

sys.path.insert(0, str(pathlib.Path(__file__).resolve().parents[1]))

import jax
import numpy as np
from jax import export

from bench import commands, environment, gpu_clock, inputs, tables, timers
from bench.failures import writing
from bench.options import make_inputs
from bench.timers import Execution
from bench.workloads import FULL, REDUCED, WORKLOADS, select
from interop.arguments import comma_separated
from interop.checkout import git_commit
from interop.workloads import Workload
from jax_moe.io.files import shown, write_atomically
from pallas_kernels import interruption
from pallas_kernels.tuning.command import positive
from tools.compare_ptx import QUIET, checkout_folder

_ROOT, _FILES = "out/times", ("times.json",)
# Runs in the checkout, with its own modules: only what all commits have is named here.
_LOWER = """
import json, pathlib, sys
from bench import environment
environment.prepare_process()
import jax, jax.numpy as jnp
jax.config.update("jax_enable_compilation_cache", False)
from jax import export
import jax_moe

shapes, target = json.loads(sys.argv[1]), pathlib.Path(sys.argv[2])
specs = [jax.ShapeDtypeStruct(shape, jnp.dtype(dtype)) for shape, dtype in shapes]
kernels = "mosaic_gpu", "mosaic_gpu_v2", "triton_kernel_call"
checks = [export.DisabledSafetyCheck.custom_call(name) for name in kernels]
layer = jax.jit(lambda *arguments: jax_moe.apply(*arguments))
target.write_bytes(export.export(layer, disabled_checks=checks)(*specs).serialize())
"""
_WARM_UP = 3

type Compiled = jax.stages.Compiled
"""What `compile_all` makes."""


def lower_all(
    checkouts: Sequence[pathlib.Path],
    arguments: Sequence[tuple[Any, ...]],
    scratch: pathlib.Path,
    jobs: int,
) -> list[list[pathlib.Path]]:
    """Where the lowered programs lie: of each checkout, one per tuple of arguments.

    Args:
        checkouts: Their folders.
        arguments: Of `jax_moe.apply`.
        scratch: An empty folder.
        jobs: Processes at once.

    Raises:
        SystemExit: A checkout does not lower.
    """
    shapes = [json.dumps([(one.shape, one.dtype.name) for one in given]) for given in arguments]
    orders = [
        (checkout, shape, scratch / f"{index}-{number}")
        for index, checkout in enumerate(checkouts)
        for number, shape in enumerate(shapes)
    ]
    for first in range(0, len(orders), jobs):
        running: list[tuple[pathlib.Path, subprocess.Popen[bytes]]] = []
        try:
            for checkout, shape, place in orders[first : first + jobs]:
                command = [sys.executable, "-c", QUIET + _LOWER, shape, str(place)]
                environ = os.environ | {"PYTHONPATH": str(checkout)}
                running.append((checkout, subprocess.Popen(command, cwd=checkout, env=environ)))
            for checkout, process in running:
                if code := process.wait():
                    raise SystemExit(f"{checkout}: does not lower (exit code {code})")
        finally:  # after an error or a signal no process stays
            for _, process in running:
                process.kill()
                process.wait()
    return [
        [scratch / f"{index}-{number}" for number in range(len(shapes))]
        for index in range(len(checkouts))
    ]


def compile_all(
    places: Sequence[Sequence[pathlib.Path]], arguments: Sequence[tuple[Any, ...]], jobs: int
) -> list[list[Compiled]]:
    """The programs of `lower_all`, compiled here in threads: XLA and ptxas run without Python.

    Args:
        places: Of each checkout, one file per tuple of arguments.
        arguments: Of the programs.
        jobs: Threads at once.
    """

    def compiled(place: pathlib.Path, given: tuple[Any, ...]) -> Compiled:
        program = export.deserialize(bytearray(place.read_bytes()))
        return jax.jit(program.call).lower(*given).compile()

    with futures.ThreadPoolExecutor(jobs) as pool:
        pending = [pool.map(compiled, of_checkout, arguments) for of_checkout in places]
        return [list(of_checkout) for of_checkout in pending]


def measure(
    runs: Sequence[Compiled],
    arguments: tuple[Any, ...],
    *,
    rounds: int,
    iterations: int,
    clock: gpu_clock.GpuClock | None,
) -> list[dict[str, Any]]:
    """What each program takes, in turns.

    Returns:
        Per program `us`, a median per round, and whether its result has the bits of the first's.
    """
    results = [np.asarray(run(*arguments)).tobytes() for run in runs]
    times: list[list[float]] = [[] for _ in runs]
    for _ in range(rounds):
        for run, found in zip(runs, times, strict=True):
            interruption.check()
            found.append(_time(functools.partial(run, *arguments), iterations, clock))
    return [
        {"us": found, "same_bits": result == results[0]}
        for found, result in zip(times, results, strict=True)
    ]


def _time(call: Callable[[], Any], iterations: int, clock: gpu_clock.GpuClock | None) -> float:
    execution = Execution(call, jax.block_until_ready, "jit", None)
    timers.warm_up(execution, _WARM_UP)
    if clock is None:
        return timers.statistics_of(timers.wall_times(execution, iterations)).median
    return timers.statistics_of([one.span_us for one in clock.time(execution, iterations)]).median


def run(
    checkouts: Sequence[pathlib.Path],
    workloads: Sequence[Workload],
    *,
    rounds: int,
    iterations: int,
    jobs: int,
    folder: pathlib.Path,
) -> None:
    """Compiles, measures, prints a table and writes `times.json`, after each number of tokens.

    Raises:
        FileError: It cannot be written; the table was printed.
    """
    on_gpu = jax.default_backend() == "gpu"
    sizes = FULL if on_gpu else REDUCED
    about = environment.about(sizes) | {"rounds": rounds, "iterations": iterations}
    about["checkouts"] = [{"folder": str(one), "commit": git_commit(one)} for one in checkouts]
    clock = None if gpu_clock.unavailable_reason() else gpu_clock.GpuClock()
    weights = inputs.draw_weights("realistic", sizes, 0)
    given = [make_inputs(row, sizes, weights)["e4m3"].arguments for row in workloads]
    names = [str(one) for one in checkouts]
    lines = [["T", *names, "last / first", "same bits"]]
    rows: list[dict[str, Any]] = []
    path = folder / _FILES[0]

    def write(*, complete: bool) -> None:
        content = {"about": about | {"complete": complete}, "rows": rows}
        with writing(path), write_atomically(path, "w") as file:
            json.dump(content, file, indent=1)

    if not on_gpu:
        print("CPU at reduced size: results are compared, times mean nothing", flush=True)
    with (
        tempfile.TemporaryDirectory() as scratch,
        commands.shown_if_cut_short(lambda: tables.aligned(lines, left=0)),
    ):
        arrays = [tuple(map(jax.numpy.asarray, one)) for one in given]
        places = lower_all(checkouts, arrays, pathlib.Path(scratch), jobs)
        compiled = compile_all(places, arrays, jobs)
        for number, (workload, arguments) in enumerate(zip(workloads, arrays, strict=True)):
            programs = [of_checkout[number] for of_checkout in compiled]
            found = measure(programs, arguments, rounds=rounds, iterations=iterations, clock=clock)
            medians = [float(np.median(one["us"])) for one in found]
            same = all(one["same_bits"] for one in found)
            lines.append([
                str(workload.num_tokens), *(f"{us:.1f}" for us in medians),
                f"{medians[-1] / medians[0]:.3f}", "yes" if same else "no",
            ])  # fmt: skip
            rows.append({"tokens": workload.num_tokens, "of_checkout": found})
            write(complete=False)
            interruption.check()
        write(complete=True)
    print("\n".join(tables.aligned(lines, left=0)))
    print(f"wrote {shown(path)}")


def main(argv: Sequence[str] | None = None) -> int:
    """Command line."""
    parser = argparse.ArgumentParser(prog="python tools/compare_times.py")
    parser.add_argument("checkouts", nargs="+", type=checkout_folder, help="folders of checkouts")
    parser.add_argument(
        "--workloads", type=comma_separated, default=("1", "80", "901"),
        help="token counts, uuids, or all",
    )  # fmt: skip
    parser.add_argument("--rounds", type=positive, default=2)
    parser.add_argument("--iterations", type=positive, default=20)
    parser.add_argument("--jobs", type=positive, default=max(1, (os.cpu_count() or 1) // 2))
    commands.add_output(parser, _ROOT)
    args = parser.parse_args(argv)
    if len(args.checkouts) < 2:
        parser.error(f"checkouts: expected two folders or more, got {args.checkouts[0]} alone")
    try:
        workloads = select(args.workloads, WORKLOADS)
        with commands.results(args.output, _ROOT, _FILES, overwrite=args.overwrite) as folder:
            run(
                args.checkouts,
                workloads,
                rounds=args.rounds,
                iterations=args.iterations,
                jobs=args.jobs,
                folder=folder,
            )
    except ValueError as error:
        parser.error(str(error))
    return 0


if __name__ == "__main__":
    environment.prepare_process()
    interruption.exit_with(main)
