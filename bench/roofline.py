"""What this device can do, measured in the same run: how fast it reads, how fast FP8 multiplies.

FP8 has two rates: that of `torch._scaled_mm`, which no kernel reaches that promotes sums, and that
of matmuls with promotion (`bench.promoted`). Hence two floors, the unpromoted and the promoted one.
"""

import statistics
from collections.abc import Callable
from typing import Any, NamedTuple

from bench import promoted
from bench.gpu_clock import GpuClock
from bench.timers import Execution, no_wait
from bench.workloads import Sizes

_READ_ELEMENTS = 400 * 2**20  # of 4 bytes: 1.68 GB
_READ_BLOCK = 8192
_MATMUL_SIZE = 8192


class Roofline(NamedTuple):
    """The rates that every floor is computed from.

    Attributes:
        read_bytes_per_s: Streaming read.
        fp8_flops_per_s: Dense e4m3 matrix multiplication without promotion.
        probes: How both were measured.
        promoted_flops_per_s: The same with promotion, at the layer's shapes; None if not measured.
        promoted_probe: How it was measured; empty if nobody tried.
    """

    read_bytes_per_s: float
    fp8_flops_per_s: float
    probes: str
    promoted_flops_per_s: float | None = None
    promoted_probe: str = ""


def measure(clock: GpuClock | None, sizes: Sizes | None = None) -> Roofline | None:
    """Probes the GPU that torch and JAX share.

    Args:
        clock: Kernel times come from it; None takes CUDA events instead.
        sizes: Of the layer whose matmuls are probed with promotion, if there is a clock.

    Returns:
        The rates, or None where torch, Triton or an FP8 GPU is missing.
    """
    try:
        import torch
        import triton  # noqa: F401
    except ImportError:
        return None
    if not torch.cuda.is_available() or torch.cuda.get_device_capability() < (8, 9):
        return None
    time_us = _by_clock(clock) if clock else _by_events
    read_us, read_bytes = min(time_us(_streaming_read(), 8)), 4 * _READ_ELEMENTS
    matmul_us, flops = statistics.median(time_us(_fp8_matmul(), 20)), 2 * _MATMUL_SIZE**3
    found = Roofline(
        read_bytes_per_s=1e6 * read_bytes / read_us,
        fp8_flops_per_s=1e6 * flops / matmul_us,
        probes=(
            f"streaming read of {read_bytes / 1e9:.2f} GB by a Triton kernel, best of 8; "
            f"torch._scaled_mm e4m3 {_MATMUL_SIZE}^3, per-tensor scales, fast accumulation, median "
            f"of 20; {'kernel time by the profiler' if clock else 'CUDA events'}"
        ),
    )
    if clock is None or sizes is None:
        return found
    rate = promoted.measure(clock, sizes)
    return found._replace(promoted_flops_per_s=rate.flops_per_s, promoted_probe=rate.probe)


def _by_clock(clock: GpuClock) -> Callable[[Execution, int], list[float]]:
    # Not cold: the flush's dirty lines would be written back at the read's expense.
    return lambda execution, n: [s.span_us for s in clock.time(execution, n, cold=False)]


def _by_events(execution: Execution, iterations: int) -> list[float]:
    import torch

    times = []
    for _ in range(iterations):
        start, end = torch.cuda.Event(enable_timing=True), torch.cuda.Event(enable_timing=True)
        start.record()
        execution.call()
        end.record()
        torch.cuda.synchronize()
        times.append(1e3 * start.elapsed_time(end))
    return times


def _warmed(call: Callable[[], Any]) -> Execution:
    import torch

    for _ in range(3):
        call()
    torch.cuda.synchronize()
    return Execution(call, no_wait, "eager", None)


def _streaming_read() -> Execution:
    import torch

    from bench.read_kernel import read_and_sum

    source = torch.zeros(_READ_ELEMENTS, dtype=torch.float32, device="cuda")
    programs = _READ_ELEMENTS // _READ_BLOCK
    sink = torch.empty(programs, dtype=torch.float32, device="cuda")
    return _warmed(lambda: read_and_sum[(programs,)](source, sink, BLOCK=_READ_BLOCK, num_warps=8))


def _fp8_matmul() -> Execution:
    import torch

    generator = torch.Generator("cuda").manual_seed(0)
    shape = (_MATMUL_SIZE, _MATMUL_SIZE)
    lhs, rhs = (
        torch.randn(shape, device="cuda", generator=generator).to(torch.float8_e4m3fn)
        for _ in range(2)
    )
    one = torch.ones((), device="cuda")
    return _warmed(
        lambda: torch._scaled_mm(
            lhs, rhs.t(), one, one, out_dtype=torch.bfloat16, use_fast_accum=True
        )
    )
