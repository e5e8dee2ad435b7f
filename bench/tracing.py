"""Traces of a few calls that open in Perfetto (https://ui.perfetto.dev)."""

import contextlib
import os
import re
from collections.abc import Callable, Iterator
from pathlib import Path

import jax

from bench import run_folder
from bench.failures import FileError, one_line, writing
from bench.gpu_clock import GpuClock
from bench.timers import Execution
from interop import folder_lock
from interop.solutions.base import Solution
from interop.workloads import Workload
from jax_moe.io.files import naming, shown

_CALLS = 3
_TRACE = re.compile(r"\w+_T\d+(\.json\.gz)?")

Recorder = Callable[[Execution, Solution, Workload, GpuClock | None], None]


def recorder(folder: Path) -> Recorder:
    """Returns a function that leaves one trace per row in `folder`.

    With the GPU clock it is torch's profiler, which sees JAX's kernels too, as a Chrome trace
    `SOLUTION_TN.json.gz`; without it JAX's profiler, in a folder `SOLUTION_TN`, whose
    `perfetto_trace.json.gz` is the file to open. The folder must exist.
    """

    def record(
        bound: Execution, solution: Solution, workload: Workload, clock: GpuClock | None
    ) -> None:
        name = f"{solution.name}_T{workload.num_tokens}"
        with writing(folder / name):
            write(bound, name, clock)

    def write(bound: Execution, name: str, clock: GpuClock | None) -> None:
        if clock is None:
            jax.profiler.start_trace(str(folder / name), create_perfetto_trace=True)
            try:
                for _ in range(_CALLS):
                    bound.block(bound.call())
            finally:
                _stop(folder / name)
            return
        unfinished = folder / f".{name}.json.gz"
        clock.trace(bound, _CALLS, str(unfinished))
        os.replace(unfinished, folder / f"{name}.json.gz")

    return record


@contextlib.contextmanager
def held(folder: Path | None, of_run: Path, *, resume: bool) -> Iterator[None]:
    """Makes the folder of a run's traces and keeps other runs out of it.

    Args:
        folder: Of the traces; None if there are to be none.
        of_run: The folder of the run's results, whose lock is held.
        resume: Whether traces that are there may be this run's.

    Raises:
        ValueError: It cannot be used, holds traces, or another run writes there.
    """
    if folder is None:
        yield
        return
    run_folder.make("--profile", folder)
    with contextlib.ExitStack() as stack:
        try:
            if folder.resolve() != of_run.resolve():
                stack.enter_context(folder_lock.held(folder))
            if not resume:
                _refuse_earlier(folder)
        except ValueError as error:
            raise ValueError(f"--profile: {error}") from None
        yield


def _refuse_earlier(folder: Path) -> None:
    """Raises `ValueError` if a folder holds traces: another run's would stand among this one's."""
    with naming(folder):
        traces = sorted(one.name for one in folder.iterdir() if _TRACE.fullmatch(one.name))
    if traces:
        raise ValueError(
            f"{shown(folder)} holds traces of an earlier run ({', '.join(traces[:3])}"
            f"{', ...' if len(traces) > 3 else ''}); expected a folder of its own"
        )


def _stop(path: Path) -> None:
    """Ends JAX's trace, which writes it; XLA's error of a full disk is a `RuntimeError`."""
    try:
        jax.profiler.stop_trace()
    except RuntimeError as error:
        raise FileError(f"{shown(path)}: cannot be written: {one_line(error)}") from None
