"""The host's clock, the cold L2 that both clocks start from, and how many calls to time."""

import functools
import time
from collections.abc import Callable
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np

FLUSH_BYTES = 256 * 2**20  # several times any L2
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


def wall_times(execution: Execution, iterations: int) -> list[float]:
    """Host time of each call in us, from the call to its output being complete.

    The L2 is flushed before each call, outside of the timed part. No profiler may be attached: it
    inflates host times.
    """
    flush = flusher()
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
def flusher() -> Callable[[], None]:
    """Returns a function that overwrites 256 MB on the GPU and waits, leaving no input in the L2.

    Zeroing leaves dirty lines, whose write-back the timed call pays: the harsher of the usual ways.
    Without a GPU it does nothing.
    """
    if jax.default_backend() != "gpu":
        return no_wait
    try:
        import torch
    except ImportError:
        return _jax_flusher()
    if not torch.cuda.is_available():
        return _jax_flusher()
    buffer = torch.empty(FLUSH_BYTES // 4, dtype=torch.int32, device="cuda")

    def flush() -> None:
        buffer.zero_()
        torch.cuda.synchronize()

    return flush


def no_wait(_: Any = None) -> None:
    """Does nothing, where there is nothing to wait for or to flush."""


def _jax_flusher() -> Callable[[], None]:
    zero = jax.jit(jnp.zeros_like, donate_argnums=0)
    held = [jnp.zeros(FLUSH_BYTES // 4, jnp.int32)]

    def flush() -> None:
        held[0] = zero(held[0]).block_until_ready()

    return flush
