"""The host's clock, the cold L2 that both clocks start from, and how many calls to time."""

import functools
import time
from collections.abc import Callable
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np

FLUSH_BYTES = 256 * 2**20  # several times any L2
FLUSHES = ("write", "read")
"""How the L2 can be emptied."""

SLOW_US = 10_000.0
_SLOW_BUDGET_US = 200_000.0


class Execution(NamedTuple):
    """A solution bound to its inputs.

    Attributes:
        call: Launches one call and returns its output.
        block: Waits until an output is complete.
        how: "jit", "CUDA graph" or "eager".
        workspace_bytes: Memory of one call beyond inputs and output; None where not measured.
    """

    call: Callable[[], Any]
    block: Callable[[Any], None]
    how: str
    workspace_bytes: int | None


class Statistics(NamedTuple):
    """Of the times of n calls, in us."""

    median: float
    p10: float
    p90: float
    n: int


def statistics_of(times_us: list[float]) -> Statistics:
    """Median, 10th and 90th percentile; `times_us` must not be empty."""
    p10, median, p90 = np.percentile(times_us, [10, 50, 90])
    return Statistics(float(median), float(p10), float(p90), len(times_us))


def calls_to_time(latency_us: float, iterations: int) -> int:
    """`iterations`; of a call slower than 10 ms as many as fit in 0.2 s, at least 2."""
    if latency_us <= SLOW_US:
        return iterations
    return max(1, min(iterations, max(2, int(_SLOW_BUDGET_US / latency_us))))


def warm_up(execution: Execution, calls: int) -> float:
    """Runs `calls` calls (fewer of a slow one), at least one.

    Returns:
        The shortest host time of a call in us, for `calls_to_time`.
    """
    best = float("inf")
    for done in range(max(calls, 1)):
        best = min(best, _timed(execution))
        if best > SLOW_US and done >= 1:
            break
    return best


def wall_times(execution: Execution, iterations: int, flush_by: str = "write") -> list[float]:
    """Host time of each call in us, from the call to its output being complete.

    The L2 is flushed before each call, outside of the timed part. No profiler may be attached: it
    inflates host times.

    Args:
        execution: Warmed up.
        iterations: How many calls.
        flush_by: One of `FLUSHES`.
    """
    flush = flusher(flush_by)
    times = []
    for _ in range(iterations):
        flush()
        times.append(_timed(execution))
    return times


def _timed(execution: Execution) -> float:
    start = time.perf_counter_ns()
    execution.block(execution.call())
    return (time.perf_counter_ns() - start) / 1e3


@functools.cache
def flusher(how: str = "write") -> Callable[[], None]:
    """Returns a function that goes through 256 MB on the GPU and waits: no input stays in the L2.

    Args:
        how: "write" zeroes them, as other benchmarks do. That leaves dirty lines, as many as the L2
            holds, whose write-back the timed call pays. "read" reads them and leaves none. Without
            a GPU neither does anything.
    """
    if jax.default_backend() != "gpu":
        return no_wait
    try:
        import torch
    except ImportError:
        return _jax_flusher(how)
    if not torch.cuda.is_available():
        return _jax_flusher(how)
    buffer = torch.zeros(FLUSH_BYTES // 4, dtype=torch.int32, device="cuda")

    def flush() -> None:
        if how == "write":
            buffer.zero_()
        else:
            buffer.max()
        torch.cuda.synchronize()

    return flush


def no_wait(_: Any = None) -> None:
    """Does nothing, where there is nothing to wait for or to flush."""


def _jax_flusher(how: str) -> Callable[[], None]:
    zero, largest = jax.jit(jnp.zeros_like, donate_argnums=0), jax.jit(jnp.max)
    held = [jnp.zeros(FLUSH_BYTES // 4, jnp.int32)]

    def flush() -> None:
        if how == "write":
            held[0] = zero(held[0]).block_until_ready()
        else:
            largest(held[0]).block_until_ready()

    return flush
