"""Compiles JAX solutions in other processes, before the first row is measured.

Lowering a Pallas kernel takes seconds of Python, one program after another in one process. Here a
pool of processes lowers and compiles; this one loads what they send. It is the same program that
`jax.jit` would compile here, and nothing is measured meanwhile.
"""

import concurrent.futures as futures
import logging
from collections.abc import Callable, Mapping, Sequence
from concurrent.futures.process import BrokenProcessPool

import jax

from bench import environment, execution, inputs
from bench.settings import Settings
from interop.processes import spawned
from interop.solutions.base import Solution
from interop.workloads import Workload
from jax_moe import LayerInputs

Order = tuple[Solution, int]
_LOG = logging.getLogger(__name__)


def orders(
    solutions: Mapping[str, Solution], workloads: Sequence[Workload], done: set[tuple[str, str]]
) -> list[Order]:
    """Which programs a run needs that other processes may compile, the largest first.

    Args:
        solutions: Those to run.
        workloads: The rows.
        done: Name and uuid of rows that are finished.

    Returns:
        Solution and token count, each pair once.
    """
    wanted = {
        (one.name, row.num_tokens): (one, row.num_tokens)
        for one in solutions.values()
        for row in workloads
        if one.framework == "jax" and one.compile_ahead and (one.name, row.uuid) not in done
    }
    return sorted(wanted.values(), key=lambda order: -order[1])


def compile_all(
    settings: Settings, ordered: Sequence[Order], jobs: int, done: Callable[[], None]
) -> execution.Programs:
    """Compiles programs in `jobs` processes, which are gone when it returns.

    Args:
        settings: Of the run: backend and sizes.
        ordered: From `orders`.
        jobs: Processes at most.
        done: Called after each program.

    Returns:
        The programs that could be compiled; what failed is left out, to fail where it is measured.
    """
    programs: execution.Programs = {}
    with spawned(min(jobs, len(ordered)), start) as pool:
        pending = {}
        for solution, num_tokens in ordered:
            specs = inputs.specs(num_tokens, settings.sizes)
            future = pool.submit(_compile, settings, solution.name, specs)
            pending[future] = execution.key_of(solution, specs.arguments)
        for future in futures.as_completed(pending):
            try:
                programs[pending[future]] = future.result()
            except BrokenProcessPool:
                _LOG.warning("--jobs: a process ended early; the rest is compiled row by row")
                break
            except Exception as error:
                _LOG.debug("%s: %s", pending[future], error)
            done()
    return programs


def start() -> None:
    """Prepares a process that compiles."""
    environment.prepare_process()
    logging.getLogger("jax").setLevel(logging.WARNING)
    environment.enable_compilation_cache()


def _compile(settings: Settings, name: str, specs: LayerInputs) -> execution.Program:
    from bench import solutions

    run = solutions.known_to(settings)[name].run
    return execution.compiled_program(jax.jit(run).lower(*specs.arguments).compile())
