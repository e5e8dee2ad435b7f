"""The SM clock while a call runs, by the GPU's own counters, in a pass of its own.

    zero 256 MB | wait 1 ms, stamp | call | stamp | zero 256 MB | ...

A stamp is a kernel with one warp per SM that writes its SM's cycle counter beside the GPU's global
timer (`bench.stamp_kernel`). Cycles over time between the two stamps of an SM are its mean clock
over the call. Both stand on the call's stream, and the host launches all of it during the wait: a
clock that is read after the call misleads, since it recovers while the host synchronizes.

JAX's stream is not torch's, so each framework launches the stamps as its own kernels.
"""

import functools
import logging
import math
import statistics
from collections.abc import Callable
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np

from bench import nvml
from bench.failures import one_line
from bench.gpu_clock import ClockError
from bench.timers import Execution, calls_to_time, flusher
from interop.solutions.base import Framework

_LOG = logging.getLogger(__name__)
SUSTAINED_S = 0.5
_CALLS = 20
_WAIT_NS = 1_000_000  # for the host to launch a call
_LEAST_SHARE = 0.8  # of the time in which kernels run, that the stamps must be apart


class Reading(NamedTuple):
    """What the stamps around calls say.

    Attributes:
        us: From stamp to stamp, per call.
        sm_mhz: Mean SM clock meanwhile.
        power_capped: Whether the power cap held the clock down, asked right after each call, or
            after the last of calls back to back; None if the driver does not say.
        calls: How many the means are over.
    """

    us: float
    sm_mhz: float
    power_capped: bool | None
    calls: int


def unless_it_fails(what: str, read: Callable[[], Reading]) -> Reading | None:
    """The reading; None, and a warning about `what`, where there is none: times do without."""
    try:
        return read()
    except Exception as error:
        _LOG.warning("%s: no SM clock: %s", what, one_line(error))
        return None


class Interval(NamedTuple):
    """Between two stamps, medians over the SMs."""

    cycles: float
    ns: float


class Stamps(NamedTuple):
    """How a framework stamps: `launch(wait_ns)` on its stream, `read` once that is done."""

    launch: Callable[[int], Any]
    read: Callable[[Any], np.ndarray]


def during(
    execution: Execution, framework: Framework, busy_us: float, flush_by: str = "write"
) -> Reading:
    """The clock during calls as the benchmark times them: one at a time, the L2 flushed before.

    Args:
        execution: Warmed up.
        framework: Whose stream it launches on.
        busy_us: Time of a call in which kernels run.
        flush_by: How the L2 is emptied before a call, one of `timers.FLUSHES`.

    Returns:
        The means over 20 calls, fewer of slow ones.

    Raises:
        ClockError: The stamps did not enclose the calls.
        ImportError: There is no jax-triton for a JAX solution.
    """
    calls = calls_to_time(busy_us, _CALLS)
    found = _reading(execution, _stamps(framework), repeats=calls, flush_by=flush_by)
    if found.us < _LEAST_SHARE * busy_us:
        raise ClockError(f"stamps {found.us:.1f} us apart do not enclose {busy_us:.1f} us of work")
    return found


def sustained(execution: Execution, framework: Framework, call_us: float) -> Reading:
    """Time and clock of calls back to back for about `SUSTAINED_S`, the L2 as each leaves it.

    Where the host launches more slowly than the GPU runs, it is the host's time.

    Args:
        execution: Warmed up.
        framework: Whose stream it launches on.
        call_us: Of a call, about.

    Returns:
        The means over all calls.
    """
    calls = math.ceil(1e6 * SUSTAINED_S / call_us)
    return _reading(execution, _stamps(framework), back_to_back=calls)


def _reading(
    execution: Execution,
    stamps: Stamps,
    *,
    repeats: int = 1,
    back_to_back: int = 1,
    flush_by: str | None = None,
) -> Reading:
    intervals, capped = [], []
    for _ in range(repeats):
        if flush_by:
            flusher(flush_by)()
        before = stamps.launch(_WAIT_NS)
        for _ in range(back_to_back):
            output = execution.call()
        after = stamps.launch(0)
        execution.block(output)
        capped.append(nvml.power_capped())
        intervals.append(interval(stamps.read(before), stamps.read(after)))
    return pooled(intervals, capped, repeats * back_to_back)


def interval(before: np.ndarray, after: np.ndarray) -> Interval:
    """Cycles and time between two stamps on the same SM.

    Args:
        before: i32[programs, WORDS] of the kernel before the call.
        after: The same of the kernel after it.

    Returns:
        Medians over the SMs that both were on.

    Raises:
        ClockError: There is no such SM, or time or cycles did not go forward.
    """
    first, last = _by_sm(before), _by_sm(after)
    both = first.keys() & last.keys()
    if not both:
        raise ClockError("the stamps before and after a call are on different SMs")
    cycles, ns = (
        statistics.median(last[sm][place] - first[sm][place] for sm in both) for place in (0, 1)
    )
    if cycles <= 0 or ns <= 0:
        raise ClockError(f"the stamp after a call is not later: {cycles} cycles, {ns} ns")
    return Interval(cycles, ns)


def _by_sm(stamps: np.ndarray) -> dict[int, tuple[int, int]]:
    """Cycles and ns by the SM's number."""
    words = np.ascontiguousarray(stamps).view(np.uint32).astype(object)  # Python's integers
    return {sm: (low + (high << 32), ns + (more << 32)) for low, high, ns, more, sm in words}


def pooled(intervals: list[Interval], capped: list[bool | None], calls: int) -> Reading:
    """All cycles over all time, so that the timer's granularity counts once per sum."""
    cycles, ns = (sum(values) for values in zip(*intervals, strict=True))
    known = [one for one in capped if one is not None]
    return Reading(ns / 1e3 / calls, 1e3 * cycles / ns, any(known) if known else None, calls)


@functools.cache
def _stamps(framework: Framework) -> Stamps:
    """The framework's stamps, compiled: both waits have run once."""
    found = _jax_stamps() if framework == "jax" else _torch_stamps()
    for wait_ns in (_WAIT_NS, 0):
        found.read(found.launch(wait_ns))
    return found


def _jax_stamps() -> Stamps:
    from bench import stamp_kernel
    from pallas_kernels.triton.launch import call

    num_sms = _num_sms()
    stamp = jax.jit(lambda wait_ns: call(stamp_kernel.launch(wait_ns, num_sms))[0])
    waits = {wait_ns: jnp.array([wait_ns], jnp.int32) for wait_ns in (_WAIT_NS, 0)}
    return Stamps(lambda wait_ns: stamp(waits[wait_ns]), np.asarray)


def _torch_stamps() -> Stamps:
    import torch

    from bench import stamp_kernel
    from interop.triton_launch import launch_torch

    num_sms = _num_sms()
    waits = {
        wait_ns: torch.tensor([wait_ns], dtype=torch.int32, device="cuda")
        for wait_ns in (_WAIT_NS, 0)
    }
    return Stamps(
        lambda wait_ns: launch_torch(stamp_kernel.launch(waits[wait_ns], num_sms))[0],
        lambda stamps: stamps.cpu().numpy(),
    )


def _num_sms() -> int:
    import torch

    return torch.cuda.get_device_properties("cuda").multi_processor_count
