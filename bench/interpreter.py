"""The Hopper kernels on a machine without a GPU: one small row in the CPU interpreter, untimed."""

import dataclasses
import functools
from collections.abc import Sequence

import jax

import jax_moe
from bench import correctness, inputs
from bench.failures import one_line
from bench.results import CHECKED_ONLY, ERROR, PASS, WRONG, Row
from bench.runner import new_row, prepare, without_times
from bench.settings import Settings
from bench.workloads import select
from interop.solutions.base import Solution
from interop.workloads import Workload
from jax_moe import DEEPSEEK_V3, MoEConfig

_NUM_TOKENS = "7"
_MOST_TOKENS = 16  # more would take minutes


def check(settings: Settings, workloads: Sequence[Workload]) -> Row:
    """Runs the layer's Mosaic GPU kernels in the interpreter, on one workload at reduced size.

    Args:
        settings: Those of a run without a GPU.
        workloads: Those of the run. The first of at most 16 tokens is taken, else that of 7 tokens.

    Returns:
        A row without times, since those of an interpreter mean nothing.
    """
    small = [row for row in workloads if 0 < row.num_tokens <= _MOST_TOKENS]
    (workload,) = small[:1] or select([_NUM_TOKENS])
    settings = dataclasses.replace(settings, inputs="realistic", dataset=None, num_trials=1)
    weights = inputs.draw_weights(settings.inputs, settings.sizes, settings.seed)
    prepared = prepare(settings, workload, weights, settings.timer)
    row = dataclasses.replace(
        new_row(settings, SOLUTION.name, prepared), how="CPU interpreter, not timed"
    )
    (case,) = prepared.cases
    try:
        run = functools.partial(SOLUTION.run, config=settings.measured.config)
        output = jax.jit(run)(*case.inputs.arguments)
        found = correctness.check(output, case.reference, settings.tolerance)
    except Exception as error:
        return without_times(row, ERROR, one_line(error))
    status = WRONG if found.problem else PASS
    return dataclasses.replace(row, status=status, check=found, problem=found.problem)


def _run(*arguments: jax.Array, config: MoEConfig = DEEPSEEK_V3) -> jax.Array:
    with jax_moe.interpret_mode():
        return jax_moe.apply(*arguments, backend="mosaic", config=config)


def _gpu_reason() -> str | None:
    return "there is a GPU: jax_moe_mosaic runs on it" if jax.default_backend() == "gpu" else None


SOLUTION = Solution(
    name=CHECKED_ONLY,
    framework="jax",
    description="the kernels of jax_moe_mosaic in the CPU interpreter, on one small workload",
    run=_run,
    unavailable_reason=_gpu_reason,
    caveat="checked, not timed",
)
